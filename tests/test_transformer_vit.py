import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from maskgit import MaskGitViTTransformer2DModel
from maskgit.masking import masked_token_loss
from maskgit.models.transformer_vit import MaskGitViTAttnProcessor


K, CLASSES = 30, 5


def make_model(**config) -> MaskGitViTTransformer2DModel:
    """A small model of random weights, biases and norms included."""
    torch.manual_seed(0)
    config = {"sample_size": 6, "hidden_size": 40, "num_layers": 3, "num_attention_heads": 4} | config
    model = MaskGitViTTransformer2DModel(codebook_size=K, num_classes=CLASSES, intermediate_size=64, **config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_inputs(num_tokens=36, batch_size=3):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(0, K + 1, (batch_size, num_tokens), generator=generator),
        torch.randint(0, CLASSES + 1, (batch_size,), generator=generator),
    )


def make_features(num_tokens=36, batch_size=3, hidden_size=40):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch_size, num_tokens + 1, hidden_size, generator=generator) for _ in range(3)]


POSITIONS = torch.tensor([[35, 0, 7, 7, 20], [1, 2, 3, 4, 5], [9, 9, 9, 9, 9]])


@pytest.fixture(scope="module")
def model():
    return make_model()


# Sizes


@pytest.mark.parametrize(
    "hidden_size, num_layers, sample_size, parameters",
    [
        (768, 24, 16, 174_160_874),
        (768, 24, 32, 176_306_666),
        (1024, 32, 16, 341_953_002),
        (1024, 48, 16, 509_921_770),
    ],
)
def test_published_sizes(hidden_size, num_layers, sample_size, parameters):
    with torch.device("meta"):
        model = MaskGitViTTransformer2DModel(hidden_size=hidden_size, num_layers=num_layers, sample_size=sample_size)
    assert model.num_parameters() == parameters
    assert model.config.num_attention_heads == 16


def test_default_is_the_published_base_model():
    with torch.device("meta"):
        assert MaskGitViTTransformer2DModel().num_parameters() == 174_160_874


# Inputs and outputs


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("arguments", [{}, {"output_hidden_states": True}, {"full_vocabulary": True}])
def test_positions_are_rows_of_the_full_result(dtype, tolerance, arguments):
    model = make_model().to(dtype)
    input_ids, labels = make_inputs()
    arguments = {"top_down_features": [features.to(dtype) for features in make_features()], **arguments}
    with torch.no_grad():
        full = model(input_ids, labels, **arguments)
        some = model(input_ids, labels, positions=POSITIONS, **arguments)
        none = model(input_ids, labels, positions=POSITIONS[:, :0], **arguments)
    width = K + ("full_vocabulary" in arguments)
    assert full.logits.shape == (3, 36, width) and none.logits.shape == (3, 0, width)
    assert some.logits.shape == (3, 5, width) and some.logits.dtype == dtype
    expected = full.logits.gather(1, POSITIONS[..., None].expand(-1, -1, width))
    torch.testing.assert_close(some.logits, expected, rtol=tolerance, atol=tolerance * float(full.logits.abs().max()))
    if "output_hidden_states" in arguments:
        assert torch.equal(some.last_hidden_state, full.last_hidden_state)


def test_only_positions_pass_the_last_feed_forward_and_the_head(model):
    model = copy.deepcopy(model)
    widths = []
    for module in (model.transformer_blocks[1].ff, model.transformer_blocks[2].ff, model.output_head):
        module.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].shape[1]))
    with torch.no_grad():
        model(*make_inputs(), positions=POSITIONS)
        model(*make_inputs(), positions=POSITIONS, output_hidden_states=True)
    assert widths == [37, 5, 5] + [37, 37, 5]


def test_gradients_through_positions_are_those_of_the_rows():
    model = make_model()
    input_ids, labels = make_inputs()
    features = [tensor.requires_grad_() for tensor in make_features()]
    weights = torch.randn(3, 5, K)
    gradients = []
    for logits in (
        model(input_ids, labels, POSITIONS, features).logits,
        model(input_ids, labels, None, features).logits.gather(1, POSITIONS[..., None].expand(-1, -1, K)),
    ):
        model.zero_grad()
        for tensor in features:
            tensor.grad = None
        (logits * weights).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        gradients[-1] |= {f"features {i}": tensor.grad for i, tensor in enumerate(features)}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_each_position_has_its_own_bias(model):
    input_ids, labels = make_inputs()
    changed = copy.deepcopy(model)
    changed.output_bias.data[7, 3] += 1
    changed.output_bias.data[36] += 1  # the class token's, which is not read
    with torch.no_grad():
        difference = changed(input_ids, labels).logits - model(input_ids, labels).logits
    expected = torch.zeros(3, 36, K)
    expected[:, 7, 3] = 1
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=0)


def test_grids_flat_and_square_and_rectangular(model):
    input_ids, labels = make_inputs()
    with torch.no_grad():
        logits = model(input_ids, labels).logits
        assert torch.equal(model(input_ids.view(3, 6, 6), labels).logits, logits)
        rectangular = make_model(sample_size=(4, 9))
        assert torch.equal(rectangular(input_ids.view(3, 4, 9), labels).logits, rectangular(input_ids, labels).logits)


def test_full_vocabulary_appends_the_mask(model):
    input_ids, labels = make_inputs()
    with torch.no_grad():
        logits = model(input_ids, labels, full_vocabulary=True).logits
        assert logits.shape == (3, 36, K + 1)
        assert torch.equal(logits[..., :K], model(input_ids, labels).logits)


def test_outputs_as_tuples_and_names(model):
    input_ids, labels = make_inputs()
    with torch.no_grad():
        output = model(input_ids, labels)
        both = model(input_ids, labels, output_hidden_states=True)
        assert output.last_hidden_state is None and len(output.to_tuple()) == 1
        (logits,) = model(input_ids, labels, return_dict=False)
        assert torch.equal(logits, output.logits) and torch.equal(both.logits, output.logits)
        logits, hidden_states = model(input_ids, labels, output_hidden_states=True, return_dict=False)
    assert hidden_states.shape == (3, 37, 40) and torch.equal(hidden_states, both.last_hidden_state)
    # What the output head makes logits of, the class token last.
    with torch.no_grad():
        logits = F.linear(model.output_head(hidden_states[:, :36]), model.token_embed.weight[:K])
    torch.testing.assert_close(logits + model.output_bias[:36, :K], output.logits)


def test_no_class(model):
    input_ids, labels = make_inputs()
    with torch.no_grad():
        expected = model(input_ids, torch.full_like(labels, CLASSES)).logits
        assert torch.equal(model(input_ids, None).logits, expected)
        assert not torch.allclose(model(input_ids, torch.zeros_like(labels)).logits, expected)
    without = make_model(has_null_class=False)
    assert without.token_embed.num_embeddings == K + 1 + CLASSES
    with pytest.raises(ValueError, match="class_labels"):
        without(input_ids, None)


def test_top_down_features_pass_the_value_projections(model):
    """Twice the bias: the projection is applied to the features as it is, as UnlockMGM does."""
    input_ids, labels = make_inputs()
    features = make_features()
    zero = [torch.zeros_like(tensor) for tensor in features]
    without_bias, twice_the_bias = copy.deepcopy(model), copy.deepcopy(model)
    for block in without_bias.transformer_blocks:
        block.attn.to_v.bias.data.zero_()
    for block in twice_the_bias.transformer_blocks:
        block.attn.to_v.bias.data.mul_(2)
    with torch.no_grad():
        plain = model(input_ids, labels).logits
        torch.testing.assert_close(
            model(input_ids, labels, top_down_features=zero).logits, twice_the_bias(input_ids, labels).logits
        )
        torch.testing.assert_close(
            without_bias(input_ids, labels, top_down_features=zero).logits, without_bias(input_ids, labels).logits
        )
        for i in range(3):
            one = [tensor if j == i else zero[j] for j, tensor in enumerate(features)]
            assert not torch.allclose(without_bias(input_ids, labels, top_down_features=one).logits, plain)
    context, values = torch.randn(2, 37, 40), torch.randn(2, 37, 40)
    attn = without_bias.transformer_blocks[0].attn
    with torch.no_grad():
        shifted = attn(context, context, values)
        # Of the same queries and keys, attention is linear in the values.
        only = attn(context, context, values - context) - attn.to_out[0].bias
        torch.testing.assert_close(attn(context, context) + only, shifted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="2 tensors.*3 blocks"):
        model(input_ids, labels, top_down_features=features[:2])


def test_images_of_a_batch_do_not_mix_and_labels_matter(model):
    input_ids, labels = make_inputs()
    with torch.no_grad():
        logits = model(input_ids, labels).logits
        for i in range(3):
            torch.testing.assert_close(model(input_ids[[i]], labels[[i]]).logits[0], logits[i])
        assert not torch.allclose(model(input_ids, (labels + 1) % CLASSES).logits, logits)


def test_wrong_tokens_and_classes_are_errors(model):
    input_ids, labels = make_inputs()
    with pytest.raises(ValueError, match="35 tokens.*36.*resize_position_embeddings"):
        model(input_ids[:, 1:], labels)
    # K + 1 is the table's first class, -1 its mask: neither may be taken for one.
    for wrong in (K + 1, -1):
        with pytest.raises(IndexError):
            model(torch.full_like(input_ids, wrong), labels)
    for wrong in (CLASSES + 1, -1):
        with pytest.raises(IndexError):
            model(input_ids, torch.full_like(labels, wrong))
    with pytest.raises(IndexError):
        make_model(has_null_class=False)(input_ids, torch.full_like(labels, CLASSES))
    for wrong in (36, -1):  # 36 is the class token
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids, labels, positions=torch.full((3, 1), wrong))
    with pytest.raises(ValueError, match="40.*multiple of.*7"):
        make_model(num_attention_heads=7)


# Training


def test_starts_as_pytorch_does():
    torch.manual_seed(0)
    model = MaskGitViTTransformer2DModel(K, CLASSES, 16, 256, 1, 4, 512)
    reference = torch.nn.MultiheadAttention(256, 4)
    attn = model.transformer_blocks[0].attn
    for linear in (attn.to_q, attn.to_k, attn.to_v):
        assert linear.bias.abs().max() == 0
        torch.testing.assert_close(linear.weight.std(), reference.in_proj_weight.std(), rtol=0.02, atol=0)
        torch.testing.assert_close(linear.weight.max(), reference.in_proj_weight.max(), rtol=0.01, atol=0)
    assert attn.to_out[0].bias.abs().max() == 0
    torch.testing.assert_close(attn.to_out[0].weight.std(), reference.out_proj.weight.std(), rtol=0.02, atol=0)
    assert model.token_embed.weight.std().item() == pytest.approx(1, abs=0.03)
    assert model.position_embed.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.output_bias.abs().max() == 0


def test_published_loss_trains():
    """Label smoothing 0.1 over codes and mask, at all positions, visible ones included."""
    model = make_model().train()
    tokens, labels = make_inputs()
    tokens, labels = tokens % K, labels % CLASSES
    mask = torch.rand(3, 36, generator=torch.Generator().manual_seed(2)) < 0.6
    drop_label = torch.tensor([False, True, False])
    settings = {"codebook_size": K, "num_classes": CLASSES, "loss_on": "all", "label_smoothing": 0.1}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.96), weight_decay=1e-5)
    losses = []
    for _ in range(20):
        loss, count, _ = masked_token_loss(model, tokens, labels, mask, drop_label, **settings)
        optimizer.zero_grad()
        (loss / count).backward()
        if not losses:
            logits = model(
                torch.where(mask, K, tokens), torch.where(drop_label, CLASSES, labels), full_vocabulary=True
            ).logits
            log_p = logits.log_softmax(-1)
            expected = -(0.9 * log_p.gather(-1, tokens[..., None])[..., 0] + 0.1 * log_p.mean(-1)).mean()
            torch.testing.assert_close(loss / count, expected)
            assert all(parameter.grad is not None for parameter in model.parameters())
            # Rows that are never predicted learn through the input alone, and the class token's bias not at all.
            assert model.output_bias.grad[36].abs().sum() == 0 == model.output_bias.grad[:, K + 1 :].abs().sum()
        optimizer.step()
        losses.append((loss / count).item())
    assert count == 3 * 36 and losses[-1] < losses[0] - 0.4


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
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        features = [tensor.requires_grad_() for tensor in make_features()]
        model.zero_grad()
        torch.manual_seed(1)
        logits = model(input_ids, labels, POSITIONS, features, full_vocabulary=True).logits
        (model(input_ids, labels).logits.square().mean() + logits.square().mean()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        gradients[-1] |= {f"features {i}": tensor.grad for i, tensor in enumerate(features)}
    assert model.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0 or "to_k.bias" in name, name  # keys share it: softmax takes it out
        assert torch.equal(gradient, gradients[1][name]), name


# Saving, loading, and other grids and classes


def test_save_and_load(tmp_path):
    model = make_model(sample_size=(4, 9))
    input_ids, labels = make_inputs()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="bf16")
    loaded, info = MaskGitViTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected = model(input_ids, labels).logits
        assert torch.equal(loaded(input_ids, labels).logits, expected)
    half = MaskGitViTTransformer2DModel.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(
            half(input_ids, labels).logits.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())
        )


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(tmp_path, device_map):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = MaskGitViTTransformer2DModel.from_pretrained(tmp_path, device_map=device_map)
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
    assert model.position_embed.weight.requires_grad and model.output_bias.requires_grad
    with torch.no_grad():
        logits = model(input_ids, labels).logits
    assert logits.shape == (3, height * width, K) and logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = MaskGitViTTransformer2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids, labels).logits, logits)
    with pytest.raises(ValueError):
        loaded(*make_inputs(36) if height * width != 36 else make_inputs(25))


@pytest.mark.parametrize("height, width", [(12, 12), (4, 9), (3, 3)])
def test_resized_embeddings_and_biases_keep_their_places(height, width):
    model = make_model()
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    for table in (model.position_embed.weight, model.output_bias):
        table.data[:-1, :2] = torch.stack([rows, columns], dim=-1).flatten(0, 1)
    class_rows = [model.position_embed.weight[-1].clone(), model.output_bias[-1].clone()]
    model.resize_position_embeddings((height, width))
    rows, columns = ((((torch.arange(size) + 0.5) * 6 / size) - 0.5).clamp(0, 5) for size in (height, width))
    expected = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    for table, class_row in zip((model.position_embed.weight, model.output_bias), class_rows):
        torch.testing.assert_close(table[:-1, :2], expected)
        assert torch.equal(table[-1], class_row)


def test_resizing_to_the_same_grid_changes_nothing(model):
    resized = copy.deepcopy(model)
    resized.resize_position_embeddings((6, 6))
    for table in ("position_embed.weight", "output_bias"):
        torch.testing.assert_close(resized.state_dict()[table], model.state_dict()[table])


@pytest.mark.parametrize("num_classes", [2, 9])
def test_other_classes_start_at_random(model, num_classes, tmp_path):
    resized = copy.deepcopy(model)
    resized.resize_class_embeddings(num_classes)
    input_ids, labels = make_inputs()
    with torch.no_grad():
        expected = model(input_ids, None, full_vocabulary=True).logits
        assert torch.equal(resized(input_ids, None, full_vocabulary=True).logits, expected)
        assert not torch.allclose(resized(input_ids, labels % 2).logits, model(input_ids, labels % 2).logits)
        with pytest.raises(IndexError):
            resized(input_ids, torch.full_like(labels, num_classes + 1))
    resized.save_pretrained(tmp_path)
    loaded = MaskGitViTTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.num_classes == num_classes
    assert loaded.output_bias.shape == (37, K + 1 + num_classes + 1)


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

    class NoAttention(MaskGitViTAttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states, top_down_features=None):
            return torch.zeros_like(hidden_states)

    with torch.no_grad():
        expected = model(input_ids, labels).logits
        model.set_attn_processor(NoAttention())
        without = model(input_ids, labels).logits
        # No attention: no token knows of another, nor of the class.
        assert not torch.allclose(without, expected)
        assert torch.equal(model(input_ids, None).logits, without)
        model.set_attn_processor({name: MaskGitViTAttnProcessor() for name in model.attn_processors})
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


def test_compiles_without_graph_breaks_or_a_recompilation_per_step(model):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    input_ids, labels = make_inputs()
    features = make_features()
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids, labels).logits, model(input_ids, labels).logits)
        for num_positions in range(2, 12):
            positions = torch.arange(num_positions).expand(3, -1)
            torch.testing.assert_close(
                compiled(input_ids, labels, positions).logits, model(input_ids, labels, positions).logits
            )
        # Without positions, with the first number of them, and with any number.
        assert counter.frame_count <= 3
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


def test_autocast_trains_and_gives_float32(model):
    trained = copy.deepcopy(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = trained(*make_inputs()).logits
    assert logits.dtype == torch.float32  # the bias is added last
    logits.square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trained.parameters())
