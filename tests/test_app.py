import socket
import sys
import urllib.request

import numpy as np
import pytest
from PIL import Image

from maskgit import HaltonScheduler, MaskGitPipeline, SelfGuidedScheduler
from maskgit.images import MASK_FILL
from maskgit_cli import main


def test_without_gradio(tiny_pipeline_dir, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--model", str(tiny_pipeline_dir)]) == 2
    assert capfd.readouterr().err == (
        "maskgit: error: The web page needs gradio, which is not installed: pip install gradio\n"
    )


gr = pytest.importorskip("gradio")
app = pytest.importorskip("maskgit.app")

SETTINGS = (4, 2.0, 0.0, 2, 7)  # steps, guidance, self-guidance, images, seed


@pytest.fixture
def painter(tiny_pipeline_dir):
    return app.Painter(MaskGitPipeline.from_pretrained(tiny_pipeline_dir))


def drawing(image, *boxes):
    layers = []
    for box in boxes:
        layer = Image.new("RGBA", image.size)
        layer.paste((0, 0, 0, 200), box)  # the colour does not matter
        layers.append(layer)
    return {"background": image.convert("RGBA"), "layers": layers, "composite": image}


def test_samples_and_their_steps(painter):
    images, steps = painter.sample(8, "halton", *SETTINGS)
    again, _ = painter.sample(8, "halton", *SETTINGS)
    assert images == again and len(images) == 2 and images[0] != images[1]
    assert [caption for _, caption in steps] == ["0", "1", "2", "3", "4"]
    assert all((np.asarray(steps[0][0])[7::12, 7::12] == MASK_FILL).all(-1).flatten())
    assert steps[-1][0] == images[0]
    others = [painter.sample(8, name, *SETTINGS)[0] for name in ("confidence", "self-guided")]
    assert isinstance(painter.pipe.scheduler, SelfGuidedScheduler)
    assert images != others[0] != others[1]
    assert painter.sample(8, "halton", *SETTINGS)[0] == images


def test_the_models_own_scheduler_keeps_its_settings(tiny_pipeline_dir):
    pipe = MaskGitPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.scheduler = HaltonScheduler(mask_token_id=32, top_k=1)
    painter = app.Painter(pipe)
    assert painter.own_scheduler == "halton"
    painter.sample(8, "confidence", *SETTINGS)
    painter.sample(8, "halton", *SETTINGS)
    assert pipe.scheduler.config.top_k == 1


def test_drawn_masks(painter):
    image = app.for_the_editor(painter.sample(8, "halton", *SETTINGS)[0][0])
    assert image.size == (288, 288)
    mask = np.asarray(app.drawn_mask(drawing(image, (0, 0, 36, 36), (252, 252, 288, 288)))) > 0
    assert mask[:36, :36].all() and mask[252:, 252:].all() and mask.sum() == 2 * 36**2

    results = painter.inpaint(drawing(image, (0, 0, 72, 72)), 0, True, 3, "halton", *SETTINGS)
    assert len(results) == 2
    kept = [np.asarray(result)[48:, 48:] for result in results]
    assert np.array_equal(kept[0], kept[1])
    assert results[0] != results[1]


@pytest.mark.parametrize(
    "made, message",
    [
        ({"background": None, "layers": [], "composite": None}, "no image to paint on"),
        (drawing(Image.new("RGB", (16, 16))), "Nothing is drawn"),
        (drawing(Image.new("RGB", (16, 16)), (0, 0, 0, 0)), "Nothing is drawn"),
    ],
)
def test_what_is_missing_is_said_on_the_page(painter, made, message):
    with pytest.raises(gr.Error, match=message):
        painter.inpaint(made, 0, True, 3, "halton", *SETTINGS)


def test_page_is_served(tiny_pipeline_dir):
    page = app.build_page(MaskGitPipeline.from_pretrained(tiny_pipeline_dir), "tiny")
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            html = response.read().decode()
    finally:
        page.close()
    for text in ("tiny: 10 classes", "9: ankle boot", "self-guided", "/inpaint"):
        assert text in html.replace("\\u002f", "/"), text


def test_port_in_use(tiny_pipeline_dir, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", "--model", str(tiny_pipeline_dir), "--port", str(port)]) == 2
    assert f"Cannot listen on port {port} of 127.0.0.1" in capfd.readouterr().err
