"""Training of the partition transformer, with the script that trains the others."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train_maskgit
from accelerate.state import AcceleratorState
from diffusers import VQModel
from fill import state_dict
from safetensors.torch import load_file

from maskgit import MaskGitPipeline, PartitionTransformer2DModel
from maskgit.conversion.pgm import convert_pgm_transformer
from maskgit.options import load_options
from maskgit.tokenization import load_tokenizer, tokenizer_checksum


ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "pgm"


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def token_data(tmp_path_factory):
    """32 images of 10 classes as 4 x 4 tokens of 32 codes, which depend on the class and the place."""
    tokenizer, folder = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("tokens")
    VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=32,
        lookup_from_codebook=True,
    ).save_pretrained(tokenizer)
    (folder / "data").mkdir()
    names = [f"class {i}" for i in range(10)]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("uint16"), length=16), "label": datasets.ClassLabel(names=names)}
    )
    labels = np.arange(32) % 10
    rows = {"tokens": ((labels[:, None] * 3 + np.arange(16)) % 32).tolist(), "label": labels.tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    info = {"grid_height": 4, "grid_width": 4, "codebook_size": 32, "tokenizer": str(tokenizer)}
    info |= {
        "splits": {"train": {"num_parts": 1}},
        "tokenizer_checksum": tokenizer_checksum(load_tokenizer(str(tokenizer))),
    }
    (folder / "token_dataset.json").write_text(json.dumps(info))
    return folder


def test_published_training_steps(tmp_path, token_data):
    golden = load_file(GOLDEN / "train_steps.safetensors")
    manifest = json.loads((GOLDEN / "train_steps.json").read_text())
    converted = convert_pgm_transformer(state_dict(manifest), sample_size=(4, 4))
    transformer = PartitionTransformer2DModel(**converted.config)
    transformer.load_state_dict(converted.state_dict)
    transformer.save_pretrained(tmp_path / "pretrained" / "transformer")

    published = manifest["training"]
    options = train_maskgit.MaskGitOptions(
        output_dir=str(tmp_path / "run"),
        data=str(token_data),
        architecture="partition",
        pretrained_model=str(tmp_path / "pretrained"),
        train_batch_size=4,
        max_train_steps=5,
        learning_rate=published["lr"],
        lr_scheduler="constant",
        lr_warmup_steps=0,
        max_grad_norm=published["grad_clip"],
        adam_beta1=published["betas"][0],
        adam_beta2=published["betas"][1],
        adam_weight_decay=published["weight_decay"],
        label_smoothing=published["label_smoothing"],
        report_to="none",
    )
    trainer = train_maskgit.Trainer(options)
    for i, tokens in enumerate(golden["in.tokens"]):
        batch = {"input_ids": tokens[:, 1:], "label": golden["in.labels"][i]}  # without BOS
        batch |= {"mask": golden["in.group_idxs"][i, :, 1:].bool(), "drop_label": golden["in.drop_label"][i]}
        sums = trainer.train_step([batch])
        torch.testing.assert_close(sums["loss"], golden["out.losses"][i], atol=2e-5, rtol=0)
        torch.testing.assert_close(sums["grad_norm"], golden["out.grad_norms"][i], atol=2e-5, rtol=1e-4)
    trained = trainer.transformer.state_dict()
    layer = "decoder_blocks.1.attn"
    bias = golden["out.final.output_layer.linear.bias"]
    expected = {
        "group_swap.query_embed": golden["out.final.decoder.group_swap.base_embedding"][0],
        "transformer_blocks.0.norm1.weight": golden["out.final.encoder.blocks.0.norm1.weight"],
        "proj_out.bias": bias[:32],
        "proj_bos.bias": bias[33:],
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, atol=2e-5, rtol=0)
    joined = torch.cat([trained[f"{layer}.to_k.weight"], trained[f"{layer}.to_v.weight"]])
    torch.testing.assert_close(joined, golden["out.final.decoder.layers.1.attn_kv.weight"], atol=2e-5, rtol=0)
    registers = golden["out.final.reg_tokens.weight"]
    torch.testing.assert_close(trained["prefix_embed.weight"][:2], registers, atol=2e-5, rtol=0)


def test_debug_run_of_the_shipped_config_saves_a_pipeline(tmp_path, token_data):
    arguments = [f"output_dir={tmp_path}", f"data={token_data}", "validation_split=train", "debug=true"]
    arguments += ["mixed_precision=no", "model.num_decoder_layers=2", "report_to=none", "max_train_steps=12"]
    config = ROOT / "configs" / "pgm_fashion_mnist.yaml"
    train_maskgit.Trainer(load_options(train_maskgit.MaskGitOptions, ["--config", str(config), *arguments])).train()
    pipe = MaskGitPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(pipe.transformer, PartitionTransformer2DModel)
    assert pipe("class 3", output_type="latent").images.shape == (1, 4, 4)


@pytest.mark.parametrize(
    "name, parameters",
    [("pgm_fashion_mnist", (512, 10, 8, 2012929)), ("pgm_imagenet256", (16384, 1000, 32, 494218241))],
)
def test_shipped_configs(name, parameters):
    config = ROOT / "configs" / f"{name}.yaml"
    options = load_options(train_maskgit.MaskGitOptions, ["--config", str(config), "compile=false"])
    codebook_size, num_classes, sample_size, count = parameters
    assert options.architecture == "partition" and options.masking_schedule == "arccos"
    sizes = {"codebook_size": codebook_size, "num_classes": num_classes, "sample_size": sample_size}
    with torch.device("meta"):
        assert PartitionTransformer2DModel(**sizes, **options.model).num_parameters() == count


def test_loss_on_masked_tokens_alone_is_refused(tmp_path, token_data):
    with pytest.raises(ValueError, match="loss_on=all"):
        train_maskgit.MaskGitOptions(
            output_dir=str(tmp_path),
            data=str(token_data),
            architecture="partition",
            loss_on="masked",
            max_train_steps=1,
        )
