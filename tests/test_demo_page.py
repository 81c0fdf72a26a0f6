"""The page in a real browser: what people see, press, paint, drag, copy and save."""

import base64
import io
import json
import re
import shlex
import shutil
import signal
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from test_demo import Served, pipeline

from anyorder import Pipeline
from anyorder.cli import main as cli
from anyorder.demo.server import create_app

sync_api = pytest.importorskip("playwright.sync_api", reason="needs: pip install 'anyorder[dev]'")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 860}
MINUTE = 20_000


@pytest.fixture(scope="module")
def browser():
    """Playwright's own Chromium, else one that is installed."""
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = ("chromium", "chromium-browser", "google-chrome", "chrome")
        path = own if Path(own).exists() else next(filter(None, map(shutil.which, names)), None)
        if path is None:
            pytest.skip("no Chromium here: run 'playwright install chromium'")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with a toy pipeline, and the address of its page."""
    folder = tmp_path_factory.mktemp("site")
    pipe = pipeline()
    pipe.good_orders, pipe.example_class = ["random"], "green"
    pipe.save_pretrained(folder / "toy")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(pipe, name="toy"), lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield folder, f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture
def visit(browser, site):
    """Opens the page; nothing may fail in the browser's console."""
    contexts, problems = [], []

    def open_page(query="", size=DESKTOP, scheme="light", address=None):
        context = browser.new_context(
            viewport=size, color_scheme=scheme, permissions=["clipboard-read", "clipboard-write"]
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(MINUTE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto((address or site[1]) + query)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in problems if "status of 400" not in text and "ERR_" not in text] == []


def said(page, text, at="#status"):
    page.locator(at, has_text=text).wait_for(timeout=MINUTE)


def generate(page):
    page.locator("#status").evaluate("status => { status.textContent = ''; }")
    page.get_by_role("button", name="Generate").click()
    said(page, "Done")


def save(page, name):
    with page.expect_download() as found:
        page.get_by_role("button", name=name).click()
    return Path(found.value.path()).read_bytes(), found.value.suggested_filename


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def edited(page):
    """What `Generate` sends: image (H, W, 3) uint8 and mask (H, W) bool."""
    with page.expect_request("**/draw") as found:
        generate(page)
    sent = json.loads(found.value.post_data)
    image, mask = (opened(base64.b64decode(sent[name])) for name in ("image", "mask"))
    return image, mask[..., 0] > 0


def paint(page, begin, end):
    """Drag the pointer over the editor, from and to shares of its width and height."""
    box = page.locator("#mask").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (begin, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=4)
    page.mouse.up()


# --- generating ------------------------------------------------------------------------------------------


def test_it_opens_with_what_the_model_is_good_at(visit):
    page = visit()
    said(page, "Done: 8 images, 12 patches each, seed 0.")
    summary = "toy: 6 \u00d7 8 pixels in 3 \u00d7 4 patches, made for entropy, random"
    assert page.locator("#summary").inner_text() == summary
    assert page.locator("[name=class_labels]").input_value() == "green"
    heads = [text.split("\n") for text in page.locator(".panel h2").all_inner_texts()]
    assert heads == [["entropy", "inferred by the model"], ["random", "given beforehand"]]
    assert page.locator("#good .chip").all_inner_texts() == ["entropy", "random"]
    assert "made for entropy, random, and may be poor at other orders" in page.locator("#why").text_content()
    assert not page.get_by_role("checkbox", name="raster").is_visible(), "experiments are folded"


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_images_and_the_button_are_in_the_first_screen(visit, size):
    page = visit(size=size)
    said(page, "Done")
    for found in (page.locator("#draw"), page.locator(".tile").first):
        box = found.bounding_box()
        assert box["y"] + box["height"] <= size["height"]
        assert box["x"] + box["width"] <= size["width"]
    assert page.evaluate("() => document.documentElement.scrollWidth") <= size["width"], (
        "no sideways scrolling"
    )


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?class_labels=blue", "unknown class 'blue'"),
        ("?orders=zigzag", "unknown order 'zigzag'"),
        ("?num_images=99", "num_images=99 is not possible"),
        ("?seed=x", "seed=x is not possible"),
        ("?colour=red", "colour=red is not possible"),
        ("?task=dance", "task=dance is not possible"),
    ],
)
def test_an_address_that_asks_for_what_is_not_there_is_an_error(visit, query, message):
    page = visit(query)
    said(page, message)
    assert page.locator("#status").get_attribute("class") == "error"
    assert page.locator(".panel").count() == 0


def test_settings_that_no_longer_match_are_said_and_the_link_reproduces_them(visit, site):
    page = visit("?class_labels=red&num_images=2&orders=hilbert&seed=3&temperature=0.5")
    said(page, "Done: 2 images")
    before = save(page, "Download PNG of hilbert")
    assert not page.locator("#stale").is_visible()
    page.locator("[name=seed]").fill("4")
    assert page.locator("#stale").is_visible()
    page.locator("[name=seed]").fill("3")
    assert not page.locator("#stale").is_visible()
    page.locator("[name=class_labels]").select_option("green")
    generate(page)
    assert not page.locator("#stale").is_visible()
    page.get_by_role("button", name="Copy link").click()
    said(page, "The link is copied", "#copied")
    link = page.evaluate("() => navigator.clipboard.readText()")
    assert save(page, "Download PNG of hilbert")[0] != before[0]
    again = visit(link.removeprefix(site[1]).replace("class_labels=green", "class_labels=red"))
    said(again, "Done: 2 images")
    assert save(again, "Download PNG of hilbert") == before
    page.get_by_role("button", name="Another seed").click()
    said(page, "seed 5")


def test_an_order_is_replayed_step_by_step(visit):
    page = visit("?num_images=1&orders=raster")
    said(page, "Done")
    head, tile = page.locator("#head"), page.locator(".tile")

    def look():
        page.wait_for_timeout(150)
        return tile.evaluate("canvas => canvas.toDataURL()")

    said(page, "12 / 12", "#count")
    whole = look()
    head.fill("6")
    said(page, "6 / 12", "#count")
    half = look()
    head.press("ArrowRight")
    said(page, "7 / 12", "#count")
    seen = {whole, half, look()}
    for box in ("Numbers", "Arrows"):
        page.get_by_role("checkbox", name=box).check()
        seen.add(look())
    page.locator("#show").select_option("map")
    seen.add(look())
    assert len(seen) == 6, "each of them looks different"
    page.get_by_role("button", name="Play").click()
    said(page, "12 / 12", "#count")


def test_the_files_of_a_run(visit, site):
    page = visit("?class_labels=red&num_images=3&orders=entropy&seed=2")
    said(page, "Done")
    expected = Pipeline.from_pretrained(site[0] / "toy")("red", 3, "entropy", generator=2)
    sheet, name = save(page, "Download PNG")
    assert name == "entropy-seed2.png"
    for i, image in enumerate(expected.images):
        y, x = 192 * (i // 2), 256 * (i % 2)
        got = opened(sheet)[y : y + 192 : 32, x : x + 256 : 32]
        np.testing.assert_array_equal(got, np.asarray(image))
    for kind in ("WebP", "GIF"):
        film, name = save(page, f"Download {kind}")
        assert name == f"entropy-seed2.{kind.lower()}"
        assert Image.open(io.BytesIO(film)).n_frames == 13
    found = json.loads(save(page, "Download JSON")[0])
    assert torch.equal(torch.tensor(found["order"]), expected.order)
    assert (found["pipeline"], found["class_labels"], found["grid"], found["known"]) == (
        "toy",
        "red",
        [3, 4],
        0,
    )


# --- editing ---------------------------------------------------------------------------------------------


def opened_editor(visit, query="&num_images=1&orders=random", **how):
    page = visit(f"?class_labels=red{query}", **how)
    said(page, "Done")
    page.locator(".tile").first.click()
    page.locator("#mask").wait_for()
    return page


def test_painting_and_its_tools(visit):
    page = opened_editor(visit)
    tool = lambda name: page.get_by_role("radio", name=name).check()  # noqa: E731
    press = lambda name: page.get_by_role("button", name=name, exact=True).click()  # noqa: E731
    page.get_by_role("button", name="Generate").click()
    said(page, "Paint first what is to be generated")
    page.locator("#size").fill("1")
    paint(page, (0.06, 0.08), (0.4, 0.08))
    image, mask = edited(page)
    assert (image.shape, mask.sum()) == ((6, 8, 3), mask[0, :4].sum())
    assert 3 <= mask[0, :4].sum() <= 4
    tool("Rectangle")
    paint(page, (0.5, 0.5), (0.99, 0.99))
    assert edited(page)[1][3:, 4:].all()
    tool("Eraser")
    paint(page, (0.56, 0.58), (0.95, 0.58))
    erased = edited(page)[1]
    assert not erased[3, 4:].any()
    assert erased[4:, 4:].all()
    press("Invert")
    np.testing.assert_array_equal(edited(page)[1], ~erased)
    press("Undo")
    np.testing.assert_array_equal(edited(page)[1], erased)
    press("Whole image")
    assert edited(page)[1].all()
    press("Clear")
    assert page.locator("#stale").is_visible()
    press("Undo")
    assert edited(page)[1].all()
    box = page.locator("#mask").bounding_box()
    press("Clear")
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, button="right")
    page.get_by_role("button", name="Generate").click()
    said(page, "Paint first what is to be generated")  # only the first button paints


def test_painting_by_keyboard(visit):
    page = opened_editor(visit)
    page.locator("#size").fill("1")
    page.locator("#mask").focus()
    for key in ("ArrowLeft", "ArrowUp", "Space", "ArrowRight", "Space", "Control+z"):
        page.keyboard.press(key)
    mask = edited(page)[1]
    assert mask.any()
    assert mask[:, 4:].sum() == 0
    spoken = page.locator("#spoken").inner_text()
    assert re.match(r"Column \d+, row \d+. \d+ percent of the image is painted.", spoken)
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("radio", name="Rectangle").check()
    page.locator("#mask").focus()
    for key in ("Space", *["ArrowRight"] * 3, *["ArrowDown"] * 2, "Space"):
        page.keyboard.press(key)
    assert edited(page)[1].sum() == 6
    tile = page.locator(".tile").first
    tile.focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Generate").click()
    said(page, "Paint first")


def test_the_border_grows_by_fields_and_by_dragging(visit):
    page = opened_editor(visit)
    page.get_by_role("spinbutton", name="Right").fill("1")
    page.get_by_role("spinbutton", name="Top").fill("1")
    image, mask = edited(page)
    assert image.shape == (8, 10, 3)
    assert mask[:2].all()
    assert mask[:, 8:].all()
    assert not mask[2:, :8].any()
    assert page.locator("#count").inner_text() == "8 / 8"
    page.get_by_role("spinbutton", name="Right").fill("0")
    page.get_by_role("spinbutton", name="Top").fill("0")
    size = page.locator("#mask").bounding_box()
    box = page.locator(".handle.bottom").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y + size["height"] * 0.67, steps=5)
    page.mouse.up()
    assert page.get_by_role("spinbutton", name="Bottom").input_value() == "2"
    assert edited(page)[0].shape == (10, 8, 3)
    page.get_by_role("spinbutton", name="Left").fill("50")
    said(page, "At most 48 patches")
    assert page.get_by_role("spinbutton", name="Left").input_value() == "0"


def test_what_is_edited_can_be_saved_and_done_in_python_and_by_command(visit, site, tmp_path, monkeypatch):
    page = opened_editor(visit, "&num_images=2&orders=random&orders=raster")
    paint(page, (0.3, 0.3), (0.7, 0.5))
    generate(page)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").symlink_to(site[0] / "toy")
    for name in ("image.png", "mask.png"):
        (tmp_path / name).write_bytes(save(page, f"Save {name}")[0])
    sheets = {
        name: opened(save(page, f"Download PNG of {name}")[0])[::32, ::32] for name in ("random", "raster")
    }
    page.get_by_role("button", name="Copy Python").click()
    said(page, "The Python code is copied. It reads image.png and mask.png", "#copied")
    exec(page.evaluate("() => navigator.clipboard.readText()"), {})
    page.get_by_role("button", name="Copy command").click()
    said(page, "The command is copied", "#copied")
    for command in page.locator("#code").inner_text().splitlines():
        assert cli.main(shlex.split(command)[1:]) == 0
    for number, name in enumerate(sheets):
        for i in range(2):
            shown = sheets[name][:, 8 * i : 8 * i + 8]
            for path in (f"order-{number}-{i}.png", f"{name}/{i:04d}.png"):
                np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / path)), shown)


def test_variations(visit):
    page = opened_editor(visit, "&num_images=2&orders=random")
    page.locator("[name=keep]").select_option("0.5")
    generate(page)
    said(page, "Done: 2 images, 6 patches each")
    assert page.get_by_role("button", name="Save mask.png").is_hidden()
    film, _ = save(page, "Download WebP")
    assert Image.open(io.BytesIO(film)).n_frames == 7


def test_a_sample_is_dragged_into_the_editor(visit):
    page = visit("?class_labels=red&num_images=1&orders=random")
    said(page, "Done")
    shown = opened(save(page, "Download PNG")[0])[::32, ::32]
    page.get_by_role("radio", name="Edit an image").check()
    assert page.locator("#empty").is_visible()
    page.get_by_role("button", name="Generate").click()
    said(page, "Choose an image to edit first")
    page.locator(".tile").drag_to(page.locator("#stage"))
    page.get_by_role("button", name="Whole image").click()
    np.testing.assert_array_equal(edited(page)[0], shown)


def upload(page, name, data, kind="image/png"):
    page.locator("#file").set_input_files({"name": name, "mimeType": kind, "buffer": data})


def file_of(image, kind="PNG", **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def test_photos_are_scaled_down_and_hostile_files_are_refused(visit):
    page = opened_editor(visit)
    photo = Image.new("RGB", (8000, 5000), (200, 40, 40))  # 40 megapixels
    photo.paste((40, 40, 200), (4000, 0, 8000, 5000))
    upload(page, "photo.jpg", file_of(photo, "JPEG"), "image/jpeg")
    page.locator("#undo:enabled").wait_for(timeout=MINUTE)  # it would bring back what was edited before
    page.get_by_role("button", name="Whole image").click()
    image, _ = edited(page)
    assert image.shape == (6, 8, 3)
    assert np.abs(image[:, :3].astype(int) - (200, 40, 40)).max() < 10
    assert np.abs(image[:, 5:].astype(int) - (40, 40, 200)).max() < 10
    hostile = {
        "text.png": b"hello", "empty.png": b"", "page.html": b"<script>alert(1)</script>",
        "bomb.png": file_of(Image.new("1", (12000, 12000))),
        "cut.jpg": file_of(photo.resize((80, 50)), "JPEG")[:100],
    }  # fmt: skip
    for name, data in hostile.items():
        upload(page, name, data)
        said(page, name)
        assert page.locator("#status").get_attribute("class") == "error"
    said(page, "cut.jpg cannot be read as an image")
    np.testing.assert_array_equal(edited(page)[0], image)


# --- for everybody ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_axe_finds_nothing_serious(visit, size, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs 'anyorder[dev]'").Axe()
    page = opened_editor(visit, "&num_images=2&orders=random&orders=raster", size=size, scheme=scheme)
    paint(page, (0.3, 0.3), (0.7, 0.5))
    page.get_by_role("button", name="Copy Python").click()
    page.locator("#code").wait_for()
    page.locator("#model > summary").click()
    page.locator("[name=seed]").fill("9")
    found = axe.run(page).response["violations"]
    serious = [(v["id"], v["nodes"][0]["target"]) for v in found if v["impact"] in ("serious", "critical")]
    assert serious == []


def test_everything_is_reached_by_tab(visit):
    page = visit("?num_images=1")
    said(page, "Done")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id || document.activeElement.name"))
    top = {"task", "class_labels", "draw"}
    player = {"head", "play", "speed", "show", "numbers", "arrows", "link", "python", "command"}
    assert top | player | {"orders", "num_images", "seed", "next", "temperature", "guidance_scale"} <= reached


def test_the_page_says_that_the_server_is_gone(visit):
    with Served() as served:
        page = visit("?num_images=16&orders=raster&orders=random", address=f"http://127.0.0.1:{served.port}/")
        page.locator("#panels .panel").first.wait_for(timeout=MINUTE)
        served.process.send_signal(signal.SIGINT)
        assert (served.process.wait(30), served.process.communicate()[1]) == (0, "")
        page.wait_for_function("() => !document.querySelector('#status').textContent.startsWith('Gen')")
        if "Done" in page.locator("#status").inner_text():  # all was there before the signal came
            page.get_by_role("button", name="Generate").click()
        said(page, "The server is gone")
