"""The web page: what it serves, what it draws, what it refuses, and that nobody's absence blocks it."""

import asyncio
import base64
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import seeded, transformer
from PIL import Image
from starlette.testclient import TestClient

from anyorder import Pipeline
from anyorder.cli import main as cli
from anyorder.contracts import Grid
from anyorder.data.captions import CaptionTokenizer, Vocabulary
from anyorder.demo import server
from anyorder.demo.server import create_app, nearest_revealed, paint
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import SCORES, Sampling
from anyorder.orders import STATIC
from anyorder.tokenizers.vq import VQConfig, VQModel

CLASSES = ["red", "green", "7"]


def pipeline(classes=CLASSES, policy=None, vocabulary=None, **model):
    torch.manual_seed(0)
    tokenizer = VQModel(
        VQConfig(
            channels=8, multipliers=(1, 2), groups=1, res_blocks=1, attention=False, z_channels=8,
            vocab_size=5, code_dim=4,
        )
    )  # fmt: skip
    drawer = transformer(num_classes=3, vocab_size=5, grid=(3, 4), **model)
    return Pipeline(drawer, tokenizer, classes, policy, vocabulary=vocabulary)


PIPE = pipeline()
CLIENT = TestClient(create_app(PIPE))


def events(client=CLIENT, **query):
    answer = client.get("/draw", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", answer.text)
    return [(name, json.loads(data)) for name, data in found]


def steps_of(order, stream):
    return [step for name, step in stream if name == "step" and step["order"] == order]


def column(steps, key):
    return torch.cat([torch.tensor(step[key]) for step in steps], dim=1)


def strip(step):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(step["png"]))))


def test_the_page_needs_nothing_from_elsewhere():
    answer = CLIENT.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "//" not in re.sub(r"^\s*//.*|\s// .*", "", answer.text, flags=re.M)
    assert not re.findall(r'(?:src|href)="(?!data:)', answer.text)
    assert "@import" not in answer.text


def test_the_page_names_its_controls():
    """Every field of a request has a control of that name, and every id that the script asks for exists."""
    page = CLIENT.get("/").text
    for name in server.GenerateRequest.__dataclass_fields__:
        assert re.search(rf'name="{name}"|name: "{name}"', page), name
    assert set(re.findall(r'\$\("([\w-]+)"\)', page)) == set(re.findall(r'id="([\w-]+)"', page))


def test_about():
    about = CLIENT.get("/about").json()
    assert about["classes"] == CLASSES
    assert (about["grid"], about["image"]) == ([3, 4], [6, 8])
    assert {order["name"] for order in about["orders"]} == {*SCORES, *STATIC, "random"}
    assert about["orders"][0]["name"] == "entropy"
    assert {o["name"] for o in about["orders"] if o["kind"] == "inferred"} == set(SCORES)
    assert all(order["text"] for order in about["orders"])
    assert [order["name"] for order in about["orders"] if not order["token_blind"]] == ["token_likelihood"]


def test_classes_without_names_are_numbered():
    about = TestClient(create_app(pipeline(classes=[]))).get("/about").json()
    assert about["classes"] == ["0", "1", "2"]


@pytest.mark.parametrize("order", ["entropy", "random", "hilbert"])
def test_an_order_of_the_page_is_the_one_of_the_pipeline(order):
    stream = events(orders=order, label="green", n=3, seed=5, temperature=0.8, guidance=1.5)
    steps = steps_of(0, stream)
    expected = PIPE("green", 3, order, 1.5, 5, sampling=Sampling(0.8))
    positions = column(steps, "positions")
    assert torch.equal(positions.sort(1).values, torch.arange(12).expand(3, 12))
    assert torch.equal(positions, expected.order)
    assert torch.equal(
        torch.zeros_like(positions).scatter(1, positions, column(steps, "tokens")), expected.tokens
    )
    torch.testing.assert_close(column(steps, "log_prob"), expected.log_prob)
    pictures = np.split(strip(steps[-1]), 3, axis=1)
    for got, image in zip(pictures, expected.images, strict=True):
        np.testing.assert_array_equal(got[..., :3], np.asarray(image))
        assert (got[..., 3] == 255).all()
    assert stream[-1] == ("end", {})


def test_orders_grow_side_by_side():
    stream = events(orders=["raster", "entropy", "raster"], n=2)
    assert [step["order"] for name, step in stream if name == "step"] == [0, 1] * 12
    for order in (0, 1):
        steps = steps_of(order, stream)
        assert [step["done"] for step in steps] == list(range(1, 13))
        seconds = [step["seconds"] for step in steps]
        assert seconds == sorted(seconds)
        assert seconds[-1] > 0
    assert column(steps_of(0, stream), "positions").tolist() == [list(range(12))] * 2


def test_defaults_are_the_pipelines_own():
    """Without an order its own policy is drawn, here with settings of its own, and is on offer by name."""
    own = PolicyConfig("max_prob", distance=0.5, per_step=5)
    pipe = pipeline(policy=own)
    client = TestClient(create_app(pipe))
    first = client.get("/about").json()["orders"][0]
    assert (first["name"], first["kind"]) == ("max_prob, distance 0.5, per_step 5", "inferred")
    both = [step for name, step in events(client, orders=["raster", own.label]) if name == "step"]
    assert [(s["order"], s["done"]) for s in both[:6]] == [(0, 1), (1, 5), (0, 2), (1, 10), (0, 3), (1, 12)]
    alone = steps_of(0, events(client))
    assert torch.equal(column(alone, "positions"), pipe(num_images=4).order)


def test_labels_are_names_before_they_are_numbers():
    def tokens(**query):
        return column(steps_of(0, events(n=4, orders="raster", **query)), "tokens")

    assert torch.equal(tokens(label="1"), tokens(label="green"))
    assert torch.equal(tokens(label="7"), PIPE(2, 4, "raster").tokens)
    assert torch.equal(tokens(label=""), PIPE(None, 4, "raster").tokens)


def test_large_grids_are_painted_now_and_then(monkeypatch):
    monkeypatch.setattr(server, "FRAMES", 5)
    steps = steps_of(0, events(orders="raster", n=1))
    assert [step["done"] for step in steps if "png" in step] == [1, 4, 7, 10, 12]


def test_only_revealed_patches_are_painted():
    tokens = torch.randint(5, (2, 12), generator=seeded(0))
    revealed = torch.zeros(2, 12, dtype=torch.bool)
    revealed[0, 5] = revealed[1, :3] = True
    pixels = np.asarray(Image.open(io.BytesIO(paint(PIPE, tokens, revealed))))
    assert pixels.shape == (6, 16, 4)
    patches = pixels[..., 3].reshape(3, 2, 2, 4, 2).transpose(2, 0, 3, 1, 4).reshape(2, 12, 4)
    np.testing.assert_array_equal(patches, np.where(revealed[..., None].numpy(), 255, 0).repeat(4, axis=2))
    hidden = torch.where(revealed, tokens, 4 - tokens)
    assert paint(PIPE, hidden, revealed) == paint(
        PIPE, tokens, revealed
    )  # what is not drawn does not shine through


def test_blank_patches_borrow_from_the_nearest():
    revealed = torch.tensor(
        [[True, False, False, False, False, True], [False, False, True, False, False, False]]
    )
    assert nearest_revealed(revealed, Grid(2, 3)).tolist() == [[0, 0, 5, 0, 5, 5], [2] * 6]
    assert nearest_revealed(torch.ones(1, 6, dtype=torch.bool), Grid(2, 3)).tolist() == [list(range(6))]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("orders=zigzag", "unknown order 'zigzag': choose from entropy; "),
        ("orders=" + "&orders=".join(STATIC), "at most 6 orders, got 9"),
        ("label=blue", "unknown class 'blue': choose one of red, green, 7"),
        ("label=3", "class labels lie in [0, 3), got 3"),
        ("label=-1", "unknown class '-1'"),
        ("n=17", "n must lie in [1, 16], got 17"),
        ("n=0", "n must lie in [1, 16], got 0"),
        ("n=many", "n='many': expected int"),
        ("n=", "n='': expected int"),
        ("seed=1.5", "seed='1.5': expected int"),
        ("seed=-1", "seed must lie in"),
        ("seed=2147483648", "seed must lie in"),
        ("temperature=warm", "temperature='warm': expected float"),
        ("temperature=nan", "temperature='nan': expected float"),
        ("temperature=1e-9", "temperature must be 0 or lie in"),
        ("label=red&guidance=inf", "guidance must lie in"),
        ("guidance=2", "guidance 2 pulls towards a class or text"),
        ("prompt=a+red+shoe", "captions"),
        ("order=raster", "unknown setting 'order', did you mean orders?"),
    ],
)
def test_mistakes_are_400_and_say_why(query, message):
    answer = CLIENT.get(f"/draw?{query}")
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_other_addresses_are_404():
    assert CLIENT.get("/etc/passwd").status_code == 404


# --- clients that come and go ----------------------------------------------------------------------------


async def request(app, query, leave_after=None):
    """Ask as a server would; the client leaves after some messages. Returns what it was sent."""
    sent, gone = [], asyncio.Event()

    async def receive():
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message.get("body", b"").decode())
        if leave_after is not None and len(sent) >= leave_after:
            gone.set()

    scope = {
        "type": "http", "method": "GET", "path": "/draw", "query_string": query.encode(), "headers": [],
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip
    await app(scope, receive, send)
    return "".join(sent)


def watched(monkeypatch):
    """The pipeline with a list of the seeds whose steps are taken."""
    taken, stream = [], PIPE.stream

    def counted(label, n, order, guidance, seed, **more):
        for step in stream(label, n, order, guidance, seed, **more):
            taken.append(seed)
            yield step

    monkeypatch.setattr(PIPE, "stream", counted)
    return taken


def test_a_client_that_leaves_stops_the_sampling(monkeypatch):
    taken = watched(monkeypatch)
    app = create_app(PIPE)

    async def visits():
        text = await request(app, "orders=raster&n=1", leave_after=4)
        steps = len(taken)
        again = await request(app, "orders=raster&n=1&seed=1")  # the turn was given back
        return text, steps, again

    text, steps, again = asyncio.run(visits())
    assert "event: end" not in text
    assert 3 <= steps < 12
    assert taken.count(0) == steps
    assert again.count("event: step") == taken.count(1) == 12
    assert again.endswith("event: end\ndata: {}\n\n")


def test_requests_take_turns(monkeypatch):
    taken = watched(monkeypatch)
    app = create_app(PIPE)

    async def visits():
        return await asyncio.gather(*(request(app, f"orders=entropy&seed={seed}") for seed in (1, 2)))

    first, second = asyncio.run(visits())
    assert taken == [1] * 12 + [2] * 12
    assert "event: waiting" not in first
    assert second.startswith("event: waiting\ndata: {}\n\nevent: step")


def test_the_page_answers_while_images_are_sampled(monkeypatch):
    """Steps are taken in another thread: the event loop is free while one is under way."""
    stream, loop_is_free = PIPE.stream, []

    def slow(*arguments, **more):
        for step in stream(*arguments, **more):
            loop_is_free.append(asyncio.run_coroutine_threadsafe(asyncio.sleep(0, True), loop[0]).result(10))
            yield step

    monkeypatch.setattr(PIPE, "stream", slow)
    app, loop = create_app(PIPE), []

    async def visit():
        loop.append(asyncio.get_running_loop())
        return await request(app, "orders=raster&n=1")

    assert asyncio.run(visit()).count("event: step") == 12
    assert loop_is_free == [True] * 12


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_serves_a_pipeline(tmp_path, monkeypatch, capsys):
    PIPE.save_pretrained(tmp_path / "pipeline")
    served = []
    monkeypatch.setattr("uvicorn.run", lambda app, **settings: served.append((app, settings)))
    assert cli.main(["demo", f"pipeline={tmp_path / 'pipeline'}", "port=8123"]) == 0
    ((app, settings),) = served
    assert (settings["host"], settings["port"]) == ("127.0.0.1", 8123)
    assert TestClient(app).get("/about").json()["classes"] == CLASSES


def test_help_and_mistakes_of_the_command(monkeypatch, capsys):
    assert cli.main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    assert "pipeline=...  (str, required)" in text
    assert "port=8000  (int)" in text
    assert cli.main(["demo", "pipeline=x", "--dry-run"]) == 0
    assert "host: 127.0.0.1" in capsys.readouterr().out
    assert cli.main(["demo"]) == 2
    assert "'pipeline' (str) is required" in capsys.readouterr().err
    assert cli.main(["demo", "pipeline=x", "port=99999"]) == 2
    assert "port must lie in [0, 65535]" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_a_web_server_the_extra_is_named(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["demo", "pipeline=x"]) == 1
    assert "pip install 'anyorder[demo]'" in capsys.readouterr().err


def test_orders_of_classes_and_location_heads_are_on_offer():
    client = TestClient(create_app(Pipeline.from_pretrained("fashion32")))
    about = client.get("/about").json()
    assert about["orders"][0]["name"] == "class_mean"
    assert all(order["text"] for order in about["orders"])
    steps = steps_of(0, events(client, label="Shoes", n=1))
    assert len(steps) == 64
    assert len(steps_of(0, events(client, n=1))) == 64, "without a class, too"
    located = TestClient(create_app(pipeline(location=True))).get("/about").json()
    assert "location" in {order["name"] for order in located["orders"]}


def test_texts_are_asked_for_where_they_are_taken():
    pytest.importorskip("tokenizers", reason="captions need: pip install 'anyorder[text]'")
    captions = CaptionTokenizer.train(["a red shoe", "a green bag"], 40)
    vocabulary = Vocabulary(CLASSES, captions=captions, length=4)
    client = TestClient(
        create_app(pipeline(vocabulary=vocabulary, text_vocab=captions.vocab_size, text_length=4))
    )
    assert client.get("/about").json()["takes_text"]
    assert not CLIENT.get("/about").json()["takes_text"]
    prompts = ("", "a red shoe", "a green bag")
    drawn = [
        column(steps_of(0, events(client, orders="raster", n=2, prompt=prompt)), "log_prob")
        for prompt in prompts
    ]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    events(client, orders="raster", n=1, prompt="a red shoe", guidance=2)
