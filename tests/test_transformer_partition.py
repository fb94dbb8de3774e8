import copy
import math

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from maskgit import MaskGitPipeline, PartitionTransformer2DModel
from maskgit.models.transformer_partition import QUERY_MODES, PartitionAttnProcessor
from maskgit.schedulers import ConfidenceScheduler, HaltonScheduler


K, CLASSES, N = 30, 5, 36
# Where the decoder attends only to the encoder's output, sampling and training are the same function.
CROSS_ONLY = [
    {},
    {"num_register_tokens": 0},
    {"num_register_tokens": 4, "query_processor": "mlp4"},
    *({"query_mode": mode} for mode in QUERY_MODES),
]
DECODERS = {
    "interleave": [1],
    "interleave, self first": [0, 2],
    "interleave-2-cross": [2],
    "2-cross-first": [2],
    "interleave-2-self, self first": [1, 2],
    "self": [0, 1, 2],
}


def make_model(**config) -> PartitionTransformer2DModel:
    """A small model of random weights, without the zeros of a fresh one, which hide what its blocks do."""
    torch.manual_seed(0)
    config = {"sample_size": 6, "hidden_size": 40, "num_layers": 2, "num_decoder_layers": 3} | config
    model = PartitionTransformer2DModel(codebook_size=K, num_classes=CLASSES, num_attention_heads=4, **config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model.eval()


def make_inputs(num_known=(10, 10, 10), num_tokens=N):
    """All tokens, the same with only some known, classes, and the groups: 0 for the known ones."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, K, (len(num_known), num_tokens), generator=generator)
    labels = torch.randint(0, CLASSES + 1, (len(num_known),), generator=generator)
    order = torch.rand(tokens.shape, generator=generator).argsort(-1).argsort(-1)
    groups = order >= torch.tensor(num_known)[:, None]
    return tokens, tokens.masked_fill(groups, K), labels, groups


@pytest.fixture(scope="module")
def model():
    return make_model()


# Sizes


@pytest.mark.parametrize("layers, count", [((12, 12), 494220290), ((14, 10), 494218242)])
def test_published_sizes(layers, count):
    with torch.device("meta"):
        model = PartitionTransformer2DModel(num_layers=layers[0], num_decoder_layers=layers[1])
    # But for the mask token's embedding, logit and bias, which the published model has and never uses.
    assert model.num_parameters() == count - 2 * 1024 - 1


# Training and sampling


@pytest.mark.parametrize("config", CROSS_ONLY, ids=str)
@pytest.mark.parametrize("num_known", [(10, 10, 10), (3, 20, 0), (0, 0, 0)], ids=str)
def test_sampling_predicts_what_training_does(config, num_known):
    model = make_model(**config)
    tokens, input_ids, labels, groups = make_inputs(num_known)
    with torch.no_grad():
        trained = model(tokens, labels, group_ids=groups, full_vocabulary=True).logits
        sampled = model(input_ids, labels, full_vocabulary=True).logits
    assert trained.shape == sampled.shape == (3, N, K + 1)
    torch.testing.assert_close(sampled[groups], trained[groups], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", DECODERS)
def test_self_attention_in_the_decoder_samples_as_trained_without_registers(mode):
    model = make_model(self_attention_layers=DECODERS[mode], num_register_tokens=0)
    tokens, input_ids, labels, groups = make_inputs((10, 20, 3))
    with torch.no_grad():
        trained = model(tokens, labels, group_ids=groups).logits
        sampled = model(input_ids, labels).logits
    torch.testing.assert_close(sampled[groups], trained[groups], rtol=1e-4, atol=1e-4)


def test_self_attention_in_the_decoder_sees_what_is_asked_for_and_masked():
    model = make_model(self_attention_layers=[1])
    _, input_ids, labels, groups = make_inputs()
    masked = groups.nonzero()[:, 1].view(3, -1)
    known = (~groups).nonzero()[:, 1].view(3, -1)
    with torch.no_grad():
        logits = model(input_ids, labels, positions=masked[:, :8]).logits
        padded = model(input_ids, labels, positions=torch.cat([masked[:, :8], known], dim=1)).logits
        fewer = model(input_ids, labels, positions=masked[:, :7]).logits
    torch.testing.assert_close(padded[:, :8], logits)
    assert not torch.allclose(fewer, logits[:, :7], atol=1e-3)


@pytest.mark.parametrize(
    "config", [{}, {"query_mode": "learn+freqs+mean"}, {"self_attention_layers": [0, 2]}], ids=str
)
def test_a_token_is_predicted_from_the_other_group_alone(config):
    model = make_model(**config)
    tokens, _, labels, groups = make_inputs((10, 20, 3))
    with torch.no_grad():
        logits = model(tokens, labels, group_ids=groups.long()).logits
        for group in (False, True):
            changed = torch.where(groups == group, (tokens + 1) % K, tokens)
            after = model(changed.view(3, 6, 6), labels, group_ids=groups.view(3, 6, 6)).logits
            assert torch.equal(after[groups == group], logits[groups == group])
            assert not torch.isclose(after[groups != group], logits[groups != group]).all(-1).any()


@pytest.mark.parametrize("config", [*CROSS_ONLY[:3], {"query_mode": "learn+freqs+logsumexp"}], ids=str)
@pytest.mark.parametrize("num_known", [(10, 10, 10), (3, 20, 0)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_positions_are_rows_of_the_full_result(config, num_known, dtype, tolerance):
    model = make_model(**config).to(dtype)
    _, input_ids, labels, _ = make_inputs(num_known)
    positions = torch.tensor([[35, 0, 7, 7, 20], [1, 2, 3, 4, 5], [9, 9, 9, 9, 9]])
    with torch.no_grad():
        full = model(input_ids, labels).logits
        some = model(input_ids, labels, positions=positions).logits
        assert model(input_ids, labels, positions=positions[:, :0]).logits.shape == (3, 0, K)
    assert full.shape == (3, N, K) and some.shape == (3, 5, K) and some.dtype == dtype
    expected = full.gather(1, positions[..., None].expand(-1, -1, K))
    torch.testing.assert_close(some, expected, rtol=tolerance, atol=tolerance * float(full.abs().max()))


def test_images_of_a_batch_do_not_mix(model):
    _, input_ids, labels, _ = make_inputs((3, 20, 0))
    with torch.no_grad():
        logits = model(input_ids, labels).logits
        for i in range(3):
            torch.testing.assert_close(model(input_ids[[i]], labels[[i]]).logits[0], logits[i], rtol=1e-4, atol=1e-4)


def test_masked_positions_are_not_encoded(model):
    _, input_ids, labels, _ = make_inputs((4, 9, 0))
    lengths = []
    hook = model.transformer_blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    with torch.no_grad():
        model(input_ids, labels)
        model(input_ids[[0]], labels[[0]])
        model(input_ids[[2]], labels[[2]])
    hook.remove()
    assert lengths == [9 + 2, 4 + 2, 2]  # with BOS, and one of the two registers


def test_known_positions_in_any_order(model):
    _, input_ids, labels, groups = make_inputs()
    known = (~groups).nonzero()[:, 1].view(3, -1)
    with torch.no_grad():
        expected = model(input_ids, labels).logits
        for order in (known, known.flip(1)):
            torch.testing.assert_close(model(input_ids, labels, known_positions=order).logits, expected)
        nothing = model(torch.full_like(input_ids, K), labels).logits
        torch.testing.assert_close(model(input_ids, labels, known_positions=known[:, :0]).logits, nothing)


@pytest.mark.parametrize("num_register_tokens", [2, 4])
def test_published_lengths_hide_the_last_known_tokens(num_register_tokens):
    config = {"num_register_tokens": num_register_tokens}
    model, published = make_model(**config), make_model(**config, published_lengths=True)
    hidden = num_register_tokens // 2
    _, input_ids, labels, groups = make_inputs((10, 20, 3))
    shorter = input_ids.clone()
    for image, group in zip(shorter, groups):
        image[(~group).nonzero()[-hidden:]] = K
    with torch.no_grad():
        expected = model(shorter, labels).logits
        torch.testing.assert_close(published(input_ids, labels).logits, expected, rtol=1e-4, atol=1e-4)
        # Training counts the registers.
        tokens = input_ids.clamp(max=K - 1)
        assert torch.equal(*(m(tokens, labels, group_ids=groups).logits for m in (model, published)))


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@pytest.mark.parametrize("query_mode", QUERY_MODES)
def test_an_empty_group_predicts_from_nothing(backend, query_mode):
    model = make_model(num_register_tokens=0, query_mode=query_mode)
    tokens, _, labels, groups = make_inputs()
    with attention_backend(backend):
        logits = model(tokens, labels, group_ids=torch.zeros_like(groups)).logits
        logits.square().mean().backward()
        other = model((tokens + 1) % K, labels, group_ids=torch.zeros_like(groups)).logits
    assert logits.isfinite().all() and torch.equal(logits, other)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scheduler", [HaltonScheduler, ConfidenceScheduler])
def test_samples_through_the_pipeline(model, scheduler):
    pipe = MaskGitPipeline(model, None, scheduler(mask_token_id=K))
    pipe.set_progress_bar_config(disable=True)
    _, latents, _, groups = make_inputs((3, 20, 0))
    arguments = {"guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "latent"}
    for start in (None, latents.view(3, 6, 6)):
        tokens = pipe(
            [0, 1, 2], latents=start, generator=[torch.Generator().manual_seed(i) for i in range(3)], **arguments
        ).images
        assert tokens.shape == (3, 6, 6) and tokens.max() < K
        # An image does not depend on the others in the batch, which have other numbers of known tokens.
        alone = pipe(
            1,
            latents=None if start is None else start[[1]],
            generator=[torch.Generator().manual_seed(1)],
            **arguments,
        ).images
        assert torch.equal(alone[0], tokens[1])
    assert torch.equal(tokens.flatten(1)[~groups], latents[~groups])


# Inputs and outputs


def test_grids_flat_and_square_and_rectangular(model):
    _, input_ids, labels, _ = make_inputs()
    with torch.no_grad():
        logits = model(input_ids, labels).logits
        assert torch.equal(model(input_ids.view(3, 6, 6), labels).logits, logits)
        assert torch.equal(model(input_ids, labels, return_dict=False)[0], logits)
        rectangular = make_model(sample_size=(4, 9))
        assert torch.equal(rectangular(input_ids.view(3, 4, 9), labels).logits, rectangular(input_ids, labels).logits)


def test_full_vocabulary_appends_bos(model):
    _, input_ids, labels, _ = make_inputs()
    with torch.no_grad():
        logits = model(input_ids, labels, full_vocabulary=True).logits
        assert logits.shape == (3, N, K + 1)
        assert torch.equal(logits[..., :K], model(input_ids, labels).logits)


def test_labels(model):
    _, input_ids, labels, _ = make_inputs()
    with torch.no_grad():
        logits = model(input_ids, labels).logits
        assert not torch.allclose(model(input_ids, (labels + 1) % CLASSES).logits, logits)
        null = model(input_ids, torch.full((3,), CLASSES)).logits
        assert torch.equal(model(input_ids, None).logits, null)
    with pytest.raises(ValueError, match="class_labels"):
        make_model(has_null_class=False)(input_ids, None)


def test_wrong_inputs_are_errors(model):
    tokens, input_ids, labels, groups = make_inputs()
    with pytest.raises(ValueError, match="35 tokens.*36.*resize_position_embeddings"):
        model(input_ids[:, 1:], labels)
    with pytest.raises(ValueError, match="leave out `positions`"):
        model(tokens, labels, group_ids=groups, positions=torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(IndexError):
        model(input_ids, labels, group_ids=groups)  # with masked tokens
    for wrong in (K + 1, -1):
        with pytest.raises(IndexError):
            model(torch.full_like(input_ids, wrong), labels)
    for wrong in (CLASSES + 1, -1):
        with pytest.raises(IndexError):
            model(input_ids, torch.full_like(labels, wrong))
    for wrong in (N, -1):
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids, labels, positions=torch.full((3, 1), wrong))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids, labels, known_positions=torch.full((3, 1), wrong))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_register_tokens": 3}, "`num_register_tokens` is 3, but must be even"),
        ({"hidden_size": 44}, "`hidden_size` is 44.*multiple of twice the 4"),
        ({"query_mode": "learn+freq"}, "'learn[+]freq'.*learn[+]freqs[+]mean"),
        ({"query_processor": "mlp"}, "'mlp'.*'mlp4'"),
        ({"self_attention_layers": [3]}, "blocks 0 to 2"),
        ({"rotary_frequencies": [1.0]}, "has 1 numbers.*5 pairs"),
    ],
)
def test_wrong_configs_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        make_model(**config)


# Training


def test_fresh_model_predicts_all_codes_alike():
    torch.manual_seed(0)
    model = PartitionTransformer2DModel(
        codebook_size=K, num_classes=CLASSES, sample_size=6, hidden_size=40, num_layers=2, num_attention_heads=4
    )
    tokens, _, labels, groups = make_inputs()
    logits = model(tokens, labels, group_ids=groups, full_vocabulary=True).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(math.log(K + 1), abs=1e-6)
    hidden_states, conditioning = torch.randn(2, 7, 40), torch.randn(2, 40)
    for block in (*model.transformer_blocks, *model.decoder_blocks):
        context = () if block.norm_context is None else (None, hidden_states, model.rotary[None, :7])
        assert torch.equal(block(hidden_states, conditioning, model.rotary[None, :7], *context), hidden_states)
    assert 0.15 < model.token_embed.weight.abs().max() <= 40**-0.5 + 1e-6
    assert model.prefix_embed.weight[:-1].std() < 0.03 < model.prefix_embed.weight[-1].std()


def test_dropout_is_for_training_only():
    model, without = make_model(dropout=0.3), make_model()
    tokens, _, labels, groups = make_inputs()
    with torch.no_grad():
        expected = without(tokens, labels, group_ids=groups).logits
        assert torch.equal(model(tokens, labels, group_ids=groups).logits, expected)
        model.train()
        torch.manual_seed(0)
        first = model(tokens, labels, group_ids=groups).logits
        assert not torch.allclose(first, model(tokens, labels, group_ids=groups).logits)
        assert not torch.allclose(first, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("config", [{"query_mode": "learn+freqs+mean"}, {"self_attention_layers": [1]}], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(dropout, config):
    model = make_model(dropout=dropout, **config).train()
    tokens, _, labels, groups = make_inputs()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        torch.manual_seed(1)
        model(tokens, labels, group_ids=groups, full_vocabulary=True).logits.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert model.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_sampling_computes_the_same_with_and_without_gradients(model):
    _, input_ids, labels, _ = make_inputs()
    expected = model(input_ids, labels).logits.detach()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids, labels).logits, expected, rtol=1e-5, atol=1e-5)


# Saving and loading


def test_save_and_load(tmp_path):
    frequencies = [1.0, 0.37, 0.1, 0.037, 0.01]
    model = make_model(sample_size=(4, 9), self_attention_layers=[1], rotary_frequencies=frequencies)
    _, input_ids, labels, _ = make_inputs()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="bf16")
    loaded, info = PartitionTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected = model(input_ids, labels).logits
        assert torch.equal(loaded(input_ids, labels).logits, expected)
        assert not torch.allclose(
            make_model(sample_size=(4, 9), self_attention_layers=[1])(input_ids, labels).logits, expected
        )
    half = PartitionTransformer2DModel.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = half(input_ids, labels).logits
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(tmp_path, device_map):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = PartitionTransformer2DModel.from_pretrained(tmp_path, device_map=device_map)
    _, input_ids, labels, _ = make_inputs()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids, labels).logits, model(input_ids, labels).logits)


@pytest.mark.parametrize("offload_type, kwargs", [("block_level", {"num_blocks_per_group": 1}), ("leaf_level", {})])
def test_group_offloading(offload_type, kwargs):
    model = make_model()
    _, input_ids, labels, _ = make_inputs()
    with torch.no_grad():
        expected = model(input_ids, labels).logits
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=offload_type, **kwargs
        )
        assert torch.equal(model(input_ids, labels).logits, expected)


@pytest.mark.parametrize("sample_size", [12, (4, 9), (3, 3)])
def test_resize_position_embeddings(tmp_path, sample_size):
    model = make_model()
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    tables = model.rotary, model.query_sinusoids
    model.resize_position_embeddings(sample_size)
    assert model.config.sample_size == sample_size
    for old, new in zip(tables, (model.rotary, model.query_sinusoids)):
        assert len(new) == 3 + height * width
        assert torch.equal(new[:3], old[:3])
        old, new = old[3:].view(6, 6, -1), new[3:].view(height, width, -1)
        torch.testing.assert_close(new[:: height - 1, :: width - 1], old[::5, ::5], rtol=0, atol=1e-5)
    _, input_ids, labels, _ = make_inputs(num_tokens=height * width, num_known=(5, 5))
    with torch.no_grad():
        logits = model(input_ids, labels).logits
    assert logits.shape == (2, height * width, K) and logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = PartitionTransformer2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids, labels).logits, logits)
    model.resize_position_embeddings((6, 6))
    for old, new in zip(tables, (model.rotary, model.query_sinusoids)):
        assert torch.equal(new, old)


def test_resize_class_embeddings():
    model = make_model()
    null = model.class_embed.weight[-1].clone()
    model.resize_class_embeddings(3)
    assert model.config.num_classes == 3 and model.class_embed.weight.shape == (4, 40)
    assert torch.equal(model.class_embed.weight[-1], null)
    assert model.class_embed.weight.requires_grad


# Diffusers' and PEFT's tools


def test_attention_backends_agree(model):
    tokens, input_ids, labels, groups = make_inputs((3, 20, 0))
    outputs = []
    for backend in ("native", "_native_math"):
        with attention_backend(backend), torch.no_grad():
            logits = model(input_ids, labels).logits, model(tokens, labels, group_ids=groups).logits
            outputs.append(torch.stack(logits))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_attention_processors_can_be_replaced():
    model = make_model()
    assert len(model.attn_processors) == 2 + 1 + 3
    _, input_ids, labels, _ = make_inputs()

    class NoAttention(PartitionAttnProcessor):
        def __call__(self, attn, hidden_states, *_):
            return torch.zeros_like(hidden_states)

    with torch.no_grad():
        expected = model(input_ids, labels).logits
        model.set_attn_processor(NoAttention())
        without = model(input_ids, labels).logits
        assert torch.equal(model(torch.full_like(input_ids, K), labels).logits, without)
        assert not torch.allclose(without, expected)
        model.set_attn_processor({name: PartitionAttnProcessor() for name in model.attn_processors})
        assert torch.equal(model(input_ids, labels).logits, expected)


def test_lora_round_trip(tmp_path):
    model = make_model()
    base = copy.deepcopy(model)
    _, input_ids, labels, _ = make_inputs()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert 0 < sum(parameter.numel() for parameter in trainable) < 0.2 * base.num_parameters()
    for parameter in trainable:
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        expected = model(input_ids, labels).logits
        assert not torch.allclose(expected, base(input_ids, labels).logits)
        model.save_lora_adapter(tmp_path)
        base.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        assert torch.equal(base(input_ids, labels).logits, expected)


def test_two_group_pass_compiles_without_graph_breaks():
    config = {"query_mode": "learn+freqs+mean", "num_layers": 1, "num_decoder_layers": 2, "self_attention_layers": [1]}
    model = make_model(**config).train()
    tokens, _, labels, groups = make_inputs()
    expected = model(tokens, labels, group_ids=groups, full_vocabulary=True).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    logits = compiled(tokens, labels, group_ids=groups, full_vocabulary=True).logits
    torch.testing.assert_close(logits, expected)
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_sampling_compiles_without_graph_breaks():
    model = make_model(num_layers=1, num_decoder_layers=1)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for arguments in ("known_positions", None):
        torch._dynamo.reset()
        counter.clear()
        for num_known in (4, 5, 9):
            _, input_ids, labels, groups = make_inputs((num_known,) * 3)
            sizes = {}
            if arguments is not None:
                sizes["known_positions"] = (~groups).nonzero()[:, 1].view(3, -1)
                sizes["positions"] = groups.nonzero()[:, 1].view(3, -1)[:, : 2 * num_known]
            with torch.no_grad():
                expected = model(input_ids, labels, positions=sizes.get("positions")).logits
                torch.testing.assert_close(compiled(input_ids, labels, **sizes).logits, expected, rtol=1e-4, atol=1e-4)
        # With the known positions: the first sizes, then any. Without, no shape depends on what is known.
        assert counter.frame_count == (1 if arguments is None else 2)


def test_repeated_blocks_compile():
    model = make_model()
    torch._dynamo.reset()
    _, input_ids, labels, _ = make_inputs((3, 20, 0))
    with torch.no_grad():
        expected = model(input_ids, labels).logits
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(input_ids, labels).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("query_mode", ["learn+freqs", "learn+freqs+logsumexp"])
def test_half_precision_stays_close(dtype, query_mode):
    model = make_model(query_mode=query_mode)
    tokens, input_ids, labels, groups = make_inputs((3, 20, 0))
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        for arguments in ((input_ids, labels), (tokens, labels, None, groups)):
            expected, logits = model(*arguments).logits, half(*arguments).logits
            assert logits.dtype == dtype and logits.isfinite().all()
            assert (logits.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("query_mode", ["learn+freqs", "learn+freqs+mean"])
def test_autocast_trains(query_mode):
    model = make_model(query_mode=query_mode).train()
    tokens, _, labels, groups = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, labels, group_ids=groups, full_vocabulary=True).logits
    logits.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("frequencies", [None, [1.0, 0.1]])
def test_loading_in_half_precision_keeps_the_positions_apart(frequencies, tmp_path):
    PartitionTransformer2DModel(
        codebook_size=8,
        num_classes=2,
        sample_size=32,
        hidden_size=8,
        num_layers=1,
        num_decoder_layers=1,
        num_attention_heads=2,
        rotary_frequencies=frequencies,
    ).save_pretrained(tmp_path)
    expected = PartitionTransformer2DModel.from_pretrained(tmp_path)
    loaded = PartitionTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.rotary, expected.rotary)
    assert torch.equal(loaded.query_sinusoids, expected.query_sinusoids)


def test_labels_and_groups_of_another_number_are_refused():
    model = PartitionTransformer2DModel(
        codebook_size=8, num_classes=2, sample_size=2, hidden_size=8, num_layers=1, num_decoder_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    tokens = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="one label for each of the 2 images"):
        model(tokens, torch.tensor([1]))
    with pytest.raises(ValueError, match="one group for each token"):
        model(tokens, torch.tensor([1, 0]), group_ids=torch.zeros(2, 3))
