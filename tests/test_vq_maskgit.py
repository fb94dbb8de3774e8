import copy

import pytest
import torch
import torch.nn.functional as F

from maskgit import MaskGitVQModel
from maskgit.tokenization import decode_tokens, encode_images


CONFIG = {
    "block_out_channels": (8, 16, 16, 24),  # 8 pixels a token
    "layers_per_block": 2,
    "latent_channels": 6,
    "num_vq_embeddings": 40,  # below 26, half precision has no nearest code on the CPU
    "norm_num_groups": 4,
}


def make_model(**config) -> MaskGitVQModel:
    torch.manual_seed(0)
    model = MaskGitVQModel(**CONFIG | config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()


def make_images(height=16, width=24, batch_size=2):
    return torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_defaults_are_the_published_model():
    with torch.device("meta"):
        model = MaskGitVQModel()
    assert model.num_parameters() == 54_515_587 and len(model.state_dict()) == 168
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert parameters == {"encoder": 23_775_104, "quantize": 262_144, "decoder": 30_478_339}
    # A 1 x 1 convolution only where the width changes, and it maps the block's own output.
    shortcuts = {name: tuple(p.shape[:2]) for name, p in model.named_parameters() if "conv_shortcut" in name}
    assert shortcuts == {
        "encoder.down_blocks.2.resnets.0.conv_shortcut.weight": (256, 256),
        "encoder.down_blocks.4.resnets.0.conv_shortcut.weight": (512, 512),
        "decoder.up_blocks.1.resnets.0.conv_shortcut.weight": (256, 256),
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": (128, 128),
    }


def test_interface_of_vq_models(model):
    images = make_images()
    with torch.no_grad():
        latents = model.encode(images).latents
        quantized, _, (_, _, indices) = model.quantize(latents)
        assert latents.shape == (2, 6, 2, 3) and indices.shape == (12,) and indices.dtype == torch.long
        tokens = indices.view(2, 2, 3)
        shape = (2, 2, 3, model.quantize.vq_embed_dim)
        decoded = model.decode(tokens, force_not_quantize=True, shape=shape).sample
        assert decoded.shape == images.shape
        assert torch.equal(model.decode(indices, force_not_quantize=True, shape=shape).sample, decoded)
        # Latents are quantised before they are decoded.
        for other in (model.decode(latents), model(images)):
            torch.testing.assert_close(other.sample, decoded)
        assert torch.equal(model.encode(images, return_dict=False)[0], latents)
        sample, loss = model(images, return_dict=False)
        torch.testing.assert_close(sample, decoded)
        # The latents' distance to their codes counts a quarter; both are equal in value.
        torch.testing.assert_close(loss, 1.25 * F.mse_loss(quantized, latents))
        assert torch.equal(encode_images(model, images), tokens)
        torch.testing.assert_close(decode_tokens(model, tokens), decoded.clamp(-1, 1))


def test_nearest_code(model):
    latents = torch.randn(2, 6, 5, 7)
    indices = model.quantize(latents)[2][2]
    distances = (latents.movedim(1, -1).reshape(-1, 1, 6) - model.quantize.embedding.weight).square().sum(-1)
    assert torch.equal(indices, distances.argmin(-1))


def test_images_are_in_one_range_outside_and_another_inside(model):
    """The network lives in [0, 1]: its first layer sees 0 where an image is -1, and an output of 1 is white."""
    seen = []
    hook = model.encoder.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.encode(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))
        hook.remove()
        assert torch.equal(seen[0][0, :, 0, 0], torch.tensor([0.0, 0.5, 1.0]))
        constant = copy.deepcopy(model)
        constant.decoder.conv_out.weight.zero_()
        constant.decoder.conv_out.bias.copy_(torch.tensor([0.0, 0.5, 1.5]))
        sample = constant.decode(torch.zeros(1, 1, 1).long(), force_not_quantize=True, shape=(1, 1, 1, 6)).sample
    assert torch.equal(sample[0, :, 0, 0], torch.tensor([-1.0, 0.0, 2.0])), "the output is not clipped"


def test_shortcut_starts_from_the_block_itself(model):
    """Where the width changes, the block's input does not reach its output but through the convolutions."""
    block = copy.deepcopy(model.encoder.down_blocks[1].resnets[0])
    hidden_states = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        inner = block.conv1(F.silu(block.norm1(hidden_states)))
        inner = block.conv2(F.silu(block.norm2(inner)))
        torch.testing.assert_close(block(hidden_states), inner + block.conv_shortcut(inner))
        block.conv2.weight.zero_()
        assert not block(hidden_states).any()


@pytest.mark.parametrize("height, width", [(17, 24), (16, 31), (9, 1), (33, 47)])
def test_odd_sizes_are_rounded_up(model, height, width):
    rows, columns = -(-height // 8), -(-width // 8)
    with torch.no_grad():
        assert model.encode(make_images(height, width)).latents.shape == (2, 6, rows, columns)
        assert model(make_images(height, width)).sample.shape == (2, 3, 8 * rows, 8 * columns)


def test_odd_rows_and_columns_are_averaged_alone():
    block = make_model().encoder.down_blocks[0]
    with torch.no_grad():
        for resnet in block.resnets:
            resnet.conv2.weight.zero_()  # the block's output is its input
        hidden_states = torch.arange(8 * 15.0).view(1, 8, 3, 5)
        pooled = block(hidden_states)
    assert pooled.shape == (1, 8, 2, 3)
    x = hidden_states[0, 0]
    expected = [[x[:2, :2].mean(), x[:2, 2:4].mean(), x[:2, 4].mean()], [x[2, :2].mean(), x[2, 2:4].mean(), x[2, 4]]]
    torch.testing.assert_close(pooled[0, 0], torch.tensor(expected))


def test_norm_eps_is_used(model):
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}
    assert {m.eps for m in make_model(norm_eps=1e-5).modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-5}


def test_gradient_checkpointing_gives_the_same_gradients():
    model = make_model().train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        output = model(make_images())
        (output.sample.square().mean() + output.commit_loss).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert model.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}])
def test_save_and_load(tmp_path, model, device_map):
    model.save_pretrained(tmp_path)
    loaded, info = MaskGitVQModel.from_pretrained(tmp_path, device_map=device_map, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(loaded(make_images()).sample, model(make_images()).sample)
        tokens = encode_images(loaded, make_images())
        assert torch.equal(decode_tokens(loaded, tokens), decode_tokens(model, tokens))


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading(offload_type):
    model = make_model()
    tokens = encode_images(model, make_images())
    expected = decode_tokens(model, tokens)
    options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=offload_type, **options)
    assert torch.equal(encode_images(model, make_images()), tokens)
    assert torch.equal(decode_tokens(model, tokens), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(model, dtype):
    tokens = torch.arange(6).view(1, 2, 3)
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        expected = decode_tokens(model, tokens)
        assert (decode_tokens(half, tokens) - expected).norm() < 0.05 * expected.norm()
        output = half(make_images().to(dtype)).sample
    assert output.dtype == dtype and output.isfinite().all()


def test_decoder_compiles(model):
    torch._dynamo.reset()
    tokens = torch.arange(6).view(1, 2, 3)
    compiled = copy.deepcopy(model)
    compiled.decoder.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(decode_tokens(compiled, tokens), decode_tokens(model, tokens))
