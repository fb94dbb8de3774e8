import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from maskgit import MaskGitDiTTransformer2DModel
from maskgit.models.transformer_dit import MaskGitDiTAttnProcessor


K, CLASSES = 30, 5


def make_model(**config) -> MaskGitDiTTransformer2DModel:
    """A small model of random weights, without the zeros of a fresh one, which hide what its blocks do."""
    torch.manual_seed(0)
    config = {"sample_size": 6, "hidden_size": 40, "num_layers": 3, "num_attention_heads": 4} | config
    model = MaskGitDiTTransformer2DModel(codebook_size=K, num_classes=CLASSES, intermediate_size=64, **config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_inputs(num_tokens=36, batch_size=3):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(0, K + 1, (batch_size, num_tokens), generator=generator),
        torch.randint(0, CLASSES + 1, (batch_size,), generator=generator),
    )


def make_features(sequence=37, batch_size=3, hidden_size=40):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch_size, sequence, hidden_size, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def model():
    return make_model()


# Sizes


@pytest.mark.parametrize(
    "hidden_size, num_layers, num_attention_heads, sample_size, millions",
    [
        (384, 6, 6, 16, 23.0),
        (512, 12, 6, 16, 69.3),
        (512, 12, 6, 24, 69.5),
        (768, 12, 12, 16, 142.2),
        (768, 12, 12, 24, 142.5),
        (1024, 24, 16, 24, 480.0),
    ],
)
def test_published_sizes(hidden_size, num_layers, num_attention_heads, sample_size, millions):
    with torch.device("meta"):
        model = MaskGitDiTTransformer2DModel(
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            sample_size=sample_size,
        )
    assert f"{model.num_parameters() / 1e6:.1f}" == f"{millions:.1f}"
    # 6 heads of 85 channels in the small model.
    assert model.transformer_blocks[0].attn.to_q.weight.shape == (
        hidden_size - hidden_size % num_attention_heads,
        hidden_size,
    )


def test_default_is_the_published_base_model():
    with torch.device("meta"):
        assert f"{MaskGitDiTTransformer2DModel().num_parameters() / 1e6:.1f}" == "142.2"


# Inputs and outputs


@pytest.mark.parametrize("config", [{}, {"num_register_tokens": 0}, {"num_register_tokens": 3, "hidden_size": 42}])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_positions_are_rows_of_the_full_result(config, dtype, tolerance):
    model = make_model(**config).to(dtype)
    input_ids, labels = make_inputs()
    positions = torch.tensor([[35, 0, 7, 7, 20], [1, 2, 3, 4, 5], [9, 9, 9, 9, 9]])
    with torch.no_grad():
        full = model(input_ids, labels).logits
        some = model(input_ids, labels, positions=positions).logits
        assert model(input_ids, labels, positions=positions[:, :0]).logits.shape == (3, 0, K)
    assert full.shape == (3, 36, K) and some.shape == (3, 5, K) and some.dtype == dtype
    expected = full.gather(1, positions[..., None].expand(-1, -1, K))
    torch.testing.assert_close(some, expected, rtol=tolerance, atol=tolerance * float(full.abs().max()))
    torch.testing.assert_close(some[0, 2], some[0, 3], rtol=0, atol=tolerance)


def test_gradients_through_positions_are_those_of_the_rows():
    model = make_model()
    input_ids, labels = make_inputs()
    positions = torch.tensor([[35, 0, 7], [1, 2, 3], [9, 8, 30]])
    weights = torch.randn(3, 3, K)
    gradients = []
    for logits in (
        model(input_ids, labels, positions=positions).logits,
        model(input_ids, labels).logits.gather(1, positions[..., None].expand(-1, -1, K)),
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
        assert torch.equal(model(input_ids, labels, return_dict=False)[0], logits)
        rectangular = make_model(sample_size=(4, 9))
        assert torch.equal(rectangular(input_ids.view(3, 4, 9), labels).logits, rectangular(input_ids, labels).logits)


def test_full_vocabulary_appends_the_mask(model):
    input_ids, labels = make_inputs()
    with torch.no_grad():
        logits = model(input_ids, labels, full_vocabulary=True).logits
        assert logits.shape == (3, 36, K + 1)
        assert torch.equal(logits[..., :K], model(input_ids, labels).logits)


def test_images_of_a_batch_do_not_mix_and_labels_matter(model):
    input_ids, labels = make_inputs()
    with torch.no_grad():
        logits = model(input_ids, labels).logits
        for i in range(3):
            torch.testing.assert_close(model(input_ids[[i]], labels[[i]]).logits[0], logits[i])
        assert not torch.allclose(model(input_ids, (labels + 1) % CLASSES).logits, logits)
        null = model(input_ids, torch.full((3,), CLASSES)).logits
        assert torch.equal(model(input_ids, None).logits, null)
    assert not torch.allclose(null, logits)
    with pytest.raises(ValueError, match="class_labels"):
        make_model(has_null_class=False)(input_ids, None)


def test_last_hidden_states(model):
    """Of the whole sequence, registers included: what the output layer makes logits of, whatever positions are asked for."""
    input_ids, labels = make_inputs()
    positions = torch.tensor([[35, 0, 7], [1, 2, 3], [9, 8, 30]])
    with torch.no_grad():
        logits, hidden_states = model(input_ids, labels, output_hidden_states=True, return_dict=False)
        assert model(input_ids, labels).last_hidden_state is None
        assert len(model(input_ids, labels, return_dict=False)) == 1
        some = model(input_ids, labels, positions, None, True)
        assert hidden_states.shape == (3, 37, 40) and torch.equal(some.last_hidden_state, hidden_states)
        assert torch.equal(some.logits, logits.gather(1, positions[..., None].expand(-1, -1, K)))
        shift, scale = model.adaln_out(F.silu(model.class_embed(labels)))[:, None].chunk(2, dim=-1)
        expected = F.linear(model.norm_out(hidden_states) * (1 + scale) + shift, model.token_embed.weight[:K])
    torch.testing.assert_close(expected[:, :36] + model.output_bias[:K], logits)


def test_top_down_features_pass_the_value_projections(model):
    input_ids, labels = make_inputs()
    features = make_features()
    zero = [torch.zeros_like(tensor) for tensor in features]
    context, values = torch.randn(2, 37, 40), torch.randn(2, 37, 40)
    attn = model.transformer_blocks[0].attn
    with torch.no_grad():
        plain = model(input_ids, labels).logits
        assert torch.equal(model(input_ids, labels, top_down_features=zero).logits, plain)
        for i in range(3):
            one = [tensor if j == i else zero[j] for j, tensor in enumerate(features)]
            assert not torch.allclose(model(input_ids, labels, top_down_features=one).logits, plain)
        # Of the same queries and keys, attention is linear in the values.
        only = attn(context, context, values - context)
        torch.testing.assert_close(attn(context, context) + only, attn(context, context, values), atol=1e-5, rtol=1e-4)
        positions = torch.tensor([[35, 0], [1, 2], [9, 8]])
        full = model(input_ids, None, None, features).logits
        torch.testing.assert_close(
            model(input_ids, None, positions, features).logits, full.gather(1, positions[..., None].expand(-1, -1, K))
        )
    with pytest.raises(ValueError, match="2 tensors.*3 blocks"):
        model(input_ids, labels, top_down_features=features[:2])


def test_wrong_tokens_and_classes_are_errors(model):
    input_ids, labels = make_inputs()
    with pytest.raises(ValueError, match="35 tokens.*36.*resize_position_embeddings"):
        model(input_ids[:, 1:], labels)
    for wrong in (K + 1, -1):
        with pytest.raises(IndexError):
            model(torch.full_like(input_ids, wrong), labels)
    for wrong in (CLASSES + 1, -1):
        with pytest.raises(IndexError):
            model(input_ids, torch.full_like(labels, wrong))
    with pytest.raises(IndexError):
        make_model(has_null_class=False)(input_ids, torch.full_like(labels, CLASSES))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids, labels, positions=torch.full((3, 1), -1))


# Training


def test_fresh_blocks_are_the_identity():
    torch.manual_seed(0)
    config = {
        "codebook_size": K,
        "num_classes": CLASSES,
        "sample_size": 6,
        "hidden_size": 40,
        "num_attention_heads": 4,
    }
    model = MaskGitDiTTransformer2DModel(num_layers=3, **config).eval()
    hidden_states, conditioning = torch.randn(2, 37, 40), torch.randn(2, 40)
    with torch.no_grad():
        for block in model.transformer_blocks:
            assert torch.equal(block(hidden_states, conditioning), hidden_states)
        assert model(*make_inputs()).logits.std() > 0.01


def test_dropout_is_for_training_only():
    model, without = make_model(dropout=0.3), make_model()
    input_ids, labels = make_inputs()
    with torch.no_grad():
        expected = without(input_ids, labels).logits
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
    positions = torch.tensor([[35, 0, 7], [1, 2, 3], [9, 8, 30]])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        torch.manual_seed(1)
        logits = model(input_ids, labels, positions, make_features(), full_vocabulary=True).logits
        (model(input_ids, labels).logits.square().mean() + logits.square().mean()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert model.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


# Saving and loading


def test_save_and_load(tmp_path):
    model = make_model(sample_size=(4, 9), num_register_tokens=2)
    input_ids, labels = make_inputs()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="bf16")
    loaded, info = MaskGitDiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected = model(input_ids, labels).logits
        assert torch.equal(loaded(input_ids, labels).logits, expected)
    half = MaskGitDiTTransformer2DModel.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(
            half(input_ids, labels).logits.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())
        )


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(tmp_path, device_map):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = MaskGitDiTTransformer2DModel.from_pretrained(tmp_path, device_map=device_map)
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
    model.resize_position_embeddings(sample_size)
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    input_ids, labels = make_inputs(height * width)
    assert model.config.sample_size == sample_size
    assert model.position_embed.weight.requires_grad
    with torch.no_grad():
        logits = model(input_ids, labels).logits
    assert logits.shape == (3, height * width, K) and logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = MaskGitDiTTransformer2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids, labels).logits, logits)
    with pytest.raises(ValueError):
        loaded(*make_inputs(36) if height * width != 36 else make_inputs(25))


@pytest.mark.parametrize("height, width", [(12, 12), (4, 9), (3, 3)])
def test_resized_embeddings_keep_their_places(height, width):
    model = make_model()
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    model.position_embed.weight.data[:, :2] = torch.stack([rows, columns], dim=-1).flatten(0, 1)
    model.resize_position_embeddings((height, width))
    rows, columns = ((((torch.arange(size) + 0.5) * 6 / size) - 0.5).clamp(0, 5) for size in (height, width))
    expected = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    torch.testing.assert_close(model.position_embed.weight[:, :2], expected)


def test_resizing_to_the_same_grid_changes_nothing(model):
    resized = copy.deepcopy(model)
    resized.resize_position_embeddings((6, 6))
    torch.testing.assert_close(resized.position_embed.weight, model.position_embed.weight)


# Diffusers' and PEFT's tools


def test_attention_backends_agree(model):
    input_ids, labels = make_inputs()
    outputs = []
    for backend in ("native", "_native_math"):
        with attention_backend(backend), torch.no_grad():
            outputs.append(model(input_ids, labels).logits)
    torch.testing.assert_close(*outputs)
    pinned = copy.deepcopy(model)
    with attention_backend("native"), torch.no_grad():  # set_attention_backend sets the process-wide default too
        pinned.set_attention_backend("_native_math")
        assert {processor._attention_backend for processor in pinned.attn_processors.values()} == {"_native_math"}
        torch.testing.assert_close(pinned(input_ids, labels).logits, outputs[0])


def test_attention_processors_can_be_replaced():
    model = make_model()
    assert len(model.attn_processors) == 3
    input_ids, labels = make_inputs()

    class NoAttention(MaskGitDiTAttnProcessor):
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
        model.set_attn_processor({name: MaskGitDiTAttnProcessor() for name in model.attn_processors})
        assert torch.equal(model(input_ids, labels).logits, expected)


def test_lora_round_trip(tmp_path):
    model = make_model()
    base = copy.deepcopy(model)
    inputs = make_inputs()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert 0 < sum(parameter.numel() for parameter in trainable) < 0.2 * base.num_parameters()
    for parameter in trainable:
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        expected = model(*inputs).logits
        assert not torch.allclose(expected, base(*inputs).logits)
        model.save_lora_adapter(tmp_path)
        base.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        assert torch.equal(base(*inputs).logits, expected)
        base.disable_adapters()
        torch.testing.assert_close(base(*inputs).logits, make_model()(*inputs).logits)
        base.enable_adapters()
        base.fuse_lora()
        base.unload_lora()
        torch.testing.assert_close(base(*inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_compiles_without_graph_breaks_or_a_recompilation_per_step():
    model = make_model()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    input_ids, labels = make_inputs()
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids, labels).logits, model(input_ids, labels).logits)
        for num_positions in range(2, 12):
            positions = torch.arange(num_positions).expand(3, -1)
            torch.testing.assert_close(
                compiled(input_ids, labels, positions=positions).logits,
                model(input_ids, labels, positions=positions).logits,
            )
    # Without positions, with the first number of them, and with any number.
    assert counter.frame_count <= 3
    features = make_features()
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(input_ids, None, None, features, True).to_tuple(),
            model(input_ids, None, None, features, True).to_tuple(),
        )


def test_compiles_for_training():
    model = make_model(dropout=0.1).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input_ids, labels = make_inputs()
    compiled(input_ids, labels, full_vocabulary=True).logits.square().mean().backward()
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
    inputs = make_inputs()
    with torch.no_grad():
        expected = model(*inputs).logits
        half = copy.deepcopy(model).to(dtype)(*inputs).logits
    assert half.dtype == dtype and half.isfinite().all()
    assert (half.float() - expected).norm() < 0.03 * expected.norm()


def test_autocast_trains(model):
    trained = copy.deepcopy(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = trained(*make_inputs()).logits
    logits.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trained.parameters())


def test_class_embeddings_are_replaced_but_for_no_class():
    torch.manual_seed(0)
    model = MaskGitDiTTransformer2DModel(
        codebook_size=8, num_classes=4, sample_size=2, hidden_size=16, num_layers=1, num_attention_heads=2
    )
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.adaln.weight, std=0.5)
    tokens = torch.full((1, 4), 8)
    no_class = model(tokens, torch.tensor([4])).logits
    class_0 = model(tokens, torch.tensor([0])).logits
    model.resize_class_embeddings(7)
    assert model.config.num_classes == 7
    assert torch.equal(model(tokens, torch.tensor([7])).logits, no_class)
    assert not torch.equal(model(tokens, torch.tensor([0])).logits, class_0)
