import os
import signal


# The tests' models are tiny: several threads only wait for each other, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from diffusers import VQModel

from maskgit import HaltonScheduler, MaskGitDiTTransformer2DModel, MaskGitPipeline


CLASS_NAMES = (
    "t-shirt, top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory):
    """
    A saved pipeline of random weights, for reading only: 8 x 8 tokens of 32 codes, 16 x 16 pixels, 10 named classes, and
    3 steps with guidance as its own defaults.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = MaskGitDiTTransformer2DModel(
            codebook_size=32,
            num_classes=10,
            sample_size=8,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)  # no zeros: the fresh blocks would do nothing
        vqvae = VQModel(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(16, 16),
            latent_channels=4,
            num_vq_embeddings=32,
            norm_num_groups=4,
            lookup_from_codebook=True,
        )
        torch.nn.init.normal_(vqvae.quantize.embedding.weight)  # far apart, so that codes look different
    pipe = MaskGitPipeline(
        transformer.eval(),
        vqvae.eval(),
        HaltonScheduler(mask_token_id=32),
        id2label=dict(enumerate(CLASS_NAMES)),
        call_defaults={"num_inference_steps": 3, "guidance_scale": 2.0},
    )
    folder = tmp_path_factory.mktemp("tiny_pipeline")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it, and so do its child processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
