import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from fill import state_dict
from peft import LoraConfig
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from maskgit import MaskGitBertTransformer2DModel
from maskgit.conversion.maskgit_google import convert_muse_transformer, split_toast
from maskgit.models.transformer_bert import MaskGitBertAttnProcessor


GOLDEN = Path(__file__).parent / "golden" / "unlockmgm"
K, CLASSES = 30, 5
VOCABULARY = K + CLASSES + 1


def make_model(**config) -> MaskGitBertTransformer2DModel:
    """A small model of random weights, biases and norms included."""
    torch.manual_seed(0)
    config = {"sample_size": 6, "hidden_size": 40, "num_layers": 3, "num_attention_heads": 4} | config
    model = MaskGitBertTransformer2DModel(codebook_size=K, num_classes=CLASSES, intermediate_size=64, **config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_inputs(num_tokens=36, batch_size=3):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(0, K + 1, (batch_size, num_tokens), generator=generator),
        torch.randint(0, CLASSES, (batch_size,), generator=generator),
    )


def make_features(num_tokens=36, batch_size=3, hidden_size=40):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch_size, 1 + num_tokens, hidden_size, generator=generator) for _ in range(3)]


POSITIONS = torch.tensor([[35, 0, 7, 7, 20], [1, 2, 3, 4, 5], [9, 9, 9, 9, 9]])


@pytest.fixture(scope="module")
def model():
    return make_model()


# Sizes and published numbers


@pytest.mark.parametrize("sample_size, parameters", [(16, 172_457_193), (32, 173_047_017)])
def test_defaults_are_the_published_model(sample_size, parameters):
    with torch.device("meta"):
        model = MaskGitBertTransformer2DModel(sample_size=sample_size)
    assert model.num_parameters() == parameters
    assert model.config.num_attention_heads == 16 and model.config.activation_fn == "gelu-approximate"
    assert not model.config.has_null_class


def test_self_guidance_passes_are_unlockmgms():
    manifest = json.loads((GOLDEN / "forward_tiny.json").read_text())
    converted = convert_muse_transformer(split_toast(state_dict(manifest))[0], manifest["config"])
    model = MaskGitBertTransformer2DModel(**converted.config)
    model.load_state_dict(converted.state_dict)
    model.eval()
    case = load_file(GOLDEN / "forward_tiny.safetensors")
    source_ids, codes = case["in.input_ids"], model.config.codebook_size
    assert (source_ids[:, 1:] == manifest["config"]["mask_token_id"]).any()
    input_ids = torch.where(source_ids[:, 1:] < codes, source_ids[:, 1:], codes)

    def check(output, logits, hidden_states):
        torch.testing.assert_close(output.logits, case[logits][:, 1:], atol=2e-5, rtol=0)
        torch.testing.assert_close(output.last_hidden_state, case[hidden_states], atol=1e-5, rtol=0)

    with torch.no_grad():
        options = {"output_hidden_states": True, "full_vocabulary": True}
        plain = model(input_ids, source_ids[:, 0] - codes, **options)
        check(plain, "out.logits", "out.hidden_states")
        # The second pass sees no token and no class but through the features.
        features = case["out.top_down_features"].unbind()
        blank = torch.full_like(input_ids, codes)
        check(model(blank, None, top_down_features=features, **options), "out.toast_logits", "out.toast_hidden_states")


# Inputs and outputs


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_positions_are_rows_of_the_full_result(dtype, tolerance):
    model = make_model().to(dtype)
    input_ids, labels = make_inputs()
    with torch.no_grad():
        full = model(input_ids, labels).logits
        some = model(input_ids, labels, positions=POSITIONS).logits
        assert model(input_ids, labels, positions=POSITIONS[:, :0]).logits.shape == (3, 0, K)
    assert full.shape == (3, 36, K) and some.shape == (3, 5, K) and some.dtype == dtype
    expected = full.gather(1, POSITIONS[..., None].expand(-1, -1, K))
    torch.testing.assert_close(some, expected, rtol=tolerance, atol=tolerance * float(full.abs().max()))
    torch.testing.assert_close(some[0, 2], some[0, 3], rtol=0, atol=tolerance)


def test_last_hidden_states(model):
    """They cover the whole sequence, whatever positions are asked for, and are what the output layer reads."""
    input_ids, labels = make_inputs()
    with torch.no_grad():
        plain = model(input_ids, labels)
        logits, hidden_states = model(input_ids, labels, output_hidden_states=True, return_dict=False)
        some = model(input_ids, labels, positions=POSITIONS, output_hidden_states=True)
        assert plain.last_hidden_state is None and len(model(input_ids, labels, return_dict=False)) == 1
        torch.testing.assert_close(logits, plain.logits)
        assert hidden_states.shape == (3, 37, 40) and torch.equal(some.last_hidden_state, hidden_states)
        torch.testing.assert_close(some.logits, model(input_ids, labels, positions=POSITIONS).logits)
        dense = F.gelu(model.dense_out.proj(hidden_states[:, 1:]), approximate="tanh")
        expected = F.linear(model.norm_out(dense), model.token_embed.weight, model.output_bias)
    torch.testing.assert_close(logits, expected[..., :K])


def test_top_down_features_pass_the_value_projections(model):
    """Features of zero leave the values' bias: it counts twice, as published."""
    input_ids, labels = make_inputs()
    features, zero = make_features(), [torch.zeros(3, 37, 40)] * 3
    twice = copy.deepcopy(model)
    for block in twice.transformer_blocks:
        block.attn.to_v.bias.data *= 2
    with torch.no_grad():
        plain = model(input_ids, labels).logits
        guided = model(input_ids, labels, top_down_features=features).logits
        expected = twice(input_ids, labels).logits
        torch.testing.assert_close(model(input_ids, labels, top_down_features=zero).logits, expected)
        assert not torch.allclose(expected, plain, atol=1e-3)
        for i in range(3):  # each block has its own
            one = [features[j] if j == i else zero[j] for j in range(3)]
            assert not torch.allclose(model(input_ids, labels, top_down_features=one).logits, expected, atol=1e-3)
        torch.testing.assert_close(model(input_ids, labels, top_down_features=torch.stack(features)).logits, guided)
        some = model(input_ids, labels, positions=POSITIONS, top_down_features=features).logits
    torch.testing.assert_close(some, guided.gather(1, POSITIONS[..., None].expand(-1, -1, K)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="2 tensors.*3 blocks"):
        model(input_ids, labels, top_down_features=features[:2])


def test_gradients_through_positions_are_those_of_the_rows(model):
    input_ids, labels = make_inputs()
    weights = torch.randn(3, 5, K)
    gradients = []
    for logits in (
        model(input_ids, labels, positions=POSITIONS).logits,
        model(input_ids, labels).logits.gather(1, POSITIONS[..., None].expand(-1, -1, K)),
    ):
        model.zero_grad()
        (logits * weights).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_grids_flat_and_square_and_rectangular(model):
    input_ids, labels = make_inputs()
    with torch.no_grad():
        logits = model(input_ids, labels).logits
        assert torch.equal(model(input_ids.view(3, 6, 6), labels).logits, logits)
        rectangular = make_model(sample_size=(4, 9))
        assert torch.equal(rectangular(input_ids.view(3, 4, 9), labels).logits, rectangular(input_ids, labels).logits)


def test_full_vocabulary_appends_classes_and_mask(model):
    input_ids, labels = make_inputs()
    with torch.no_grad():
        logits = model(input_ids, labels, full_vocabulary=True).logits
        assert logits.shape == (3, 36, VOCABULARY)
        assert torch.equal(logits[..., :K], model(input_ids, labels).logits)


def test_images_of_a_batch_do_not_mix_and_labels_matter(model):
    input_ids, labels = make_inputs()
    with torch.no_grad():
        logits = model(input_ids, labels).logits
        for i in range(3):
            torch.testing.assert_close(model(input_ids[[i]], labels[[i]]).logits[0], logits[i])
        assert not torch.allclose(model(input_ids, (labels + 1) % CLASSES).logits, logits)


def test_hidden_class_is_the_mask_token(model):
    """Without labels the first token is a mask: nothing in the image's own tokens changes, nor does any class matter."""
    input_ids, labels = make_inputs()
    with torch.no_grad():
        hidden = model(input_ids, None).logits
        assert not torch.allclose(hidden, model(input_ids, labels).logits)
        masked_class = copy.deepcopy(model)
        masked_class.token_embed.weight[K : K + CLASSES] = model.token_embed.weight[-1]
        torch.testing.assert_close(masked_class(input_ids, labels).logits, hidden)


def test_null_class_has_a_row_of_its_own():
    model = make_model(has_null_class=True)
    input_ids, labels = make_inputs()
    null = torch.full_like(labels, CLASSES)
    with torch.no_grad():
        outputs = [model(input_ids, x).logits for x in (labels, null, None)]
        assert model(input_ids, null, full_vocabulary=True).logits.shape[-1] == VOCABULARY + 1
    for i, output in enumerate(outputs):
        assert not any(torch.allclose(output, other) for other in outputs[:i])
    with pytest.raises(IndexError):
        model(input_ids, null + 1)


def test_wrong_tokens_and_classes_are_errors(model):
    input_ids, labels = make_inputs()
    with pytest.raises(ValueError, match="35 tokens.*36.*resize_position_embeddings"):
        model(input_ids[:, 1:], labels)
    for wrong in (K + 1, K + 2, VOCABULARY, -1):  # K + 1 would be a class's row
        with pytest.raises(IndexError):
            model(torch.full_like(input_ids, wrong), labels)
    for wrong in (CLASSES, CLASSES + 1, -1):  # CLASSES would be the mask's row
        with pytest.raises(IndexError):
            model(input_ids, torch.full_like(labels, wrong))
    for wrong in (-1, 36):  # -1 would be the class token's position
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids, labels, positions=torch.full((3, 1), wrong))
    with pytest.raises(ValueError, match="multiple of `num_attention_heads`, 3"):
        make_model(num_attention_heads=3)
    with pytest.raises(ValueError, match="'relu'.*gelu"):
        make_model(activation_fn="relu")


def test_activations_differ():
    input_ids, labels = make_inputs()
    with torch.no_grad():
        tanh, exact = (
            make_model(activation_fn=name)(input_ids, labels).logits for name in ("gelu-approximate", "gelu")
        )
    assert 1e-5 < (tanh - exact).abs().max() < 0.05


# Training


def test_fresh_weights():
    torch.manual_seed(0)
    model = MaskGitBertTransformer2DModel(hidden_size=64, num_layers=1, intermediate_size=128)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:  # truncated at two standard deviations
            assert parameter.abs().max() <= 0.04 and parameter.std().item() == pytest.approx(0.0176, abs=1e-3), name


@pytest.mark.parametrize("attention_out_dropout", [True, False])
def test_dropout_is_for_training_only_and_where_published(attention_out_dropout):
    model = make_model(dropout=0.3, attention_out_dropout=attention_out_dropout)
    input_ids, labels = make_inputs()
    active = {name for name, module in model.named_modules() if getattr(module, "p", 0) > 0}
    expected = {"dropout_in"} | {f"transformer_blocks.{i}.dropout" for i in range(3)}
    if attention_out_dropout:
        expected |= {f"transformer_blocks.{i}.attn.to_out.1" for i in range(3)}
    assert active == expected
    assert {block.attn.dropout for block in model.transformer_blocks} == {0.3}
    with torch.no_grad():
        expected = make_model()(input_ids, labels).logits
        assert torch.equal(model(input_ids, labels).logits, expected)
        model.train()
        torch.manual_seed(0)
        first = model(input_ids, labels).logits
        assert not torch.allclose(first, model(input_ids, labels).logits)
        assert not torch.allclose(first, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_gives_the_same_gradients(dropout):
    model = make_model(dropout=dropout).train()
    input_ids, labels = make_inputs()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        features = [tensor.requires_grad_() for tensor in make_features()]
        model.zero_grad()
        torch.manual_seed(1)
        options = {"positions": POSITIONS, "top_down_features": features, "full_vocabulary": True}
        logits = model(input_ids, labels, **options).logits
        (model(input_ids, labels).logits.square().mean() + logits.square().mean()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        gradients[-1] |= {f"features {i}": tensor.grad for i, tensor in enumerate(features)}
    assert model.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


# Saving and loading


def test_save_and_load(tmp_path):
    model = make_model(sample_size=(4, 9), activation_fn="gelu", norm_eps=1e-5)
    input_ids, labels = make_inputs()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="bf16")
    loaded, info = MaskGitBertTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected = model(input_ids, labels).logits
        assert torch.equal(loaded(input_ids, labels).logits, expected)
    half = MaskGitBertTransformer2DModel.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(
            half(input_ids, labels).logits.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())
        )


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(tmp_path, device_map):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = MaskGitBertTransformer2DModel.from_pretrained(tmp_path, device_map=device_map)
    with torch.no_grad():
        assert torch.equal(loaded(*make_inputs()).logits, model(*make_inputs()).logits)


@pytest.mark.parametrize("offload_type, kwargs", [("block_level", {"num_blocks_per_group": 1}), ("leaf_level", {})])
def test_group_offloading(offload_type, kwargs):
    model = make_model()
    with torch.no_grad():
        expected = model(*make_inputs()).logits
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=offload_type, **kwargs
        )
        assert torch.equal(model(*make_inputs()).logits, expected)


@pytest.mark.parametrize("sample_size", [12, (4, 9), (3, 3)])
def test_resize_position_embeddings(tmp_path, sample_size):
    model = make_model()
    class_position = model.position_embed.weight[0].clone()
    model.resize_position_embeddings(sample_size)
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    input_ids, labels = make_inputs(height * width)
    assert model.config.sample_size == sample_size
    assert model.position_embed.weight.requires_grad and torch.equal(model.position_embed.weight[0], class_position)
    with torch.no_grad():
        logits = model(input_ids, labels).logits
    assert logits.shape == (3, height * width, K) and logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = MaskGitBertTransformer2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids, labels).logits, logits)
    with pytest.raises(ValueError):
        loaded(*make_inputs(36) if height * width != 36 else make_inputs(25))


@pytest.mark.parametrize("height, width", [(6, 6), (12, 12), (4, 9), (3, 3)])
def test_resized_embeddings_keep_their_places(height, width):
    model = make_model()
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    model.position_embed.weight.data[1:, :2] = torch.stack([rows, columns], dim=-1).flatten(0, 1)
    model.resize_position_embeddings((height, width))
    rows, columns = ((((torch.arange(size) + 0.5) * 6 / size) - 0.5).clamp(0, 5) for size in (height, width))
    expected = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    torch.testing.assert_close(model.position_embed.weight[1:, :2], expected)


@pytest.mark.parametrize("has_null_class", [False, True])
def test_resize_class_embeddings(tmp_path, has_null_class):
    model = make_model(has_null_class=has_null_class)
    input_ids, labels = make_inputs()
    null = torch.full_like(labels, CLASSES)
    with torch.no_grad():
        before = [model(input_ids, None).logits] + ([model(input_ids, null).logits] if has_null_class else [])
        model.resize_class_embeddings(7)
        assert model.config.num_classes == 7
        after = [model(input_ids, None).logits] + ([model(input_ids, null + 2).logits] if has_null_class else [])
        assert all(map(torch.equal, before, after)), "codes, mask or 'no class' changed"
        logits = model(input_ids, torch.full_like(labels, 6), full_vocabulary=True).logits
        assert logits.shape[-1] == K + 7 + 1 + has_null_class
        with pytest.raises(IndexError):
            model(input_ids, torch.full_like(labels, 7 + has_null_class))
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.save_pretrained(tmp_path)
        loaded = MaskGitBertTransformer2DModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(input_ids, labels).logits, model(input_ids, labels).logits)


# Diffusers' and PEFT's tools


def test_attention_backends_agree(model):
    input_ids, labels = make_inputs()
    outputs = []
    for backend in ("native", "_native_math"):
        with attention_backend(backend), torch.no_grad():
            outputs.append(model(input_ids, labels).logits)
    torch.testing.assert_close(*outputs)


def test_attention_processors_can_be_replaced():
    model = make_model()
    assert len(model.attn_processors) == 3
    input_ids, labels = make_inputs()

    class NoAttention(MaskGitBertAttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states, top_down_features=None):
            return torch.zeros_like(hidden_states)

    with torch.no_grad():
        expected = model(input_ids, labels).logits
        model.set_attn_processor(NoAttention())
        without = model(input_ids, labels).logits
        assert not torch.allclose(without, expected)
        # No attention: no token knows of another.
        input_ids[:, 0] = (input_ids[:, 0] + 1) % K
        assert torch.equal(model(input_ids, labels).logits[:, 1:], without[:, 1:])
        input_ids[:, 0] = (input_ids[:, 0] - 1) % K
        model.set_attn_processor({name: MaskGitBertAttnProcessor() for name in model.attn_processors})
        assert torch.equal(model(input_ids, labels).logits, expected)


def test_lora_round_trip(tmp_path):
    model = make_model()
    base = copy.deepcopy(model)
    inputs = make_inputs()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        expected = model(*inputs).logits
        assert not torch.allclose(expected, base(*inputs).logits)
        model.save_lora_adapter(tmp_path)
        base.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        assert torch.equal(base(*inputs).logits, expected)
        base.fuse_lora()
        base.unload_lora()
        torch.testing.assert_close(base(*inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_compiles_without_graph_breaks_or_a_recompilation_per_step():
    model = make_model(num_layers=2)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    input_ids, labels = make_inputs()
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids, labels).logits, model(input_ids, labels).logits)
        for num_positions in (2, 3, 5, 9):
            positions = torch.arange(num_positions).expand(3, -1)
            torch.testing.assert_close(
                compiled(input_ids, labels, positions=positions).logits,
                model(input_ids, labels, positions=positions).logits,
            )
    # Without positions, with the first number of them, and with any number.
    assert counter.frame_count <= 3


def test_self_guidance_compiles():
    model = make_model(num_layers=2, dropout=0.1).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    input_ids, labels = make_inputs()
    compiled(input_ids, labels, positions=POSITIONS, output_hidden_states=True).last_hidden_state.mean().backward()
    compiled(input_ids, None, top_down_features=make_features()[:2], full_vocabulary=True).logits.mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_repeated_blocks_compile():
    model = make_model()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(*make_inputs()).logits
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(*make_inputs()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(model, dtype):
    input_ids, labels = make_inputs()
    features = make_features()
    with torch.no_grad():
        expected = model(input_ids, labels, top_down_features=features).logits
        half = copy.deepcopy(model).to(dtype)
        logits = half(input_ids, labels, top_down_features=[tensor.to(dtype) for tensor in features]).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    assert (logits.float() - expected).norm() < 0.03 * expected.norm()


def test_autocast_trains(model):
    trained = copy.deepcopy(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = trained(*make_inputs()).logits
    logits.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trained.parameters())


def test_layerwise_casting(model):
    cast = copy.deepcopy(model)
    cast.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with torch.no_grad():
        logits, expected = cast(*make_inputs()).logits, model(*make_inputs()).logits
    assert (logits - expected).norm() < 0.03 * expected.norm()
