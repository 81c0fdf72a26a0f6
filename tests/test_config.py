import json
import math
import os
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from anyorder.cli.commands import CONFIGS, config_class
from anyorder.inference.pipeline import Pipeline
from anyorder.method.policy_config import PolicyConfig
from anyorder.settings import _settings as names_and_hints
from anyorder.settings import as_overrides, describe, parse, read_stored
from anyorder.stages.experiment import STAGES, load_experiment, load_yaml
from anyorder.stages.sample import SampleStage
from anyorder.tokenizers.losses import LossConfig


@dataclass
class Optim:
    lr: float = 3e-4
    """Peak learning rate."""
    steps: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    nesterov: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass
class Extras:
    weight: float = 1.0


@dataclass
class Base:
    name: str = "run"
    """Name of the run, which is long enough to be wrapped on to a second line of the help text of this
    very test."""


@dataclass
class Run(Base):
    kind: Literal["a", "b"] = "a"
    size: tuple[int, int] | None = None
    note: str | None = None
    tags: tuple[str, ...] = ()
    weights: list[float] = field(default_factory=list)
    out: Path = Path("out")
    labels: dict[str, str] = field(default_factory=dict)
    first: Optim = field(default_factory=Optim)
    second: Optim = field(default_factory=lambda: Optim(steps=20))
    extras: Extras | None = None


@dataclass
class Required:
    path: Path
    optim: Optim
    count: int | None


text = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=6) | st.sampled_from(
    ["null", "None", "true", "1e-3", "--help", "-1", "--", "[a]", "a: b", "=", "~"]
)
number = st.floats(allow_nan=False, allow_infinity=False)
optims = st.builds(
    Optim, lr=number, steps=st.integers(1), betas=st.tuples(number, number), nesterov=st.booleans()
)
runs = st.builds(
    Run,
    name=text,
    kind=st.sampled_from(["a", "b"]),
    size=st.none() | st.tuples(st.integers(), st.integers()),
    note=st.none() | text,
    tags=st.lists(text, max_size=3).map(tuple),
    weights=st.lists(number, max_size=3),
    out=text.map(Path),
    labels=st.dictionaries(text, text, max_size=2),
    first=optims,
    second=optims,
    extras=st.none() | st.builds(Extras, number),
)


@settings(max_examples=50, deadline=None)
@given(runs)
def test_yaml_round_trip(run):
    values = {**asdict(run), "out": str(run.out)}
    run.out = Path(os.path.expanduser(run.out))
    assert parse(Run, yaml.safe_load(yaml.safe_dump(values))) == run


def test_defaults_and_partial_groups():
    assert parse(Run) == Run()
    run = parse(Run, {"second": {"lr": 1}, "first": None, "extras": {}})
    assert run.second == Optim(lr=1.0, steps=20)
    assert run.first == Optim()
    assert run.extras is None
    assert parse(Run, {"extras.weight": 2}).extras == Extras(2.0)


# Numbers that may be negative: -1 has a meaning there.
LATER = ("heads", "extrapolated")  # refused by the model that they are for
NEGATIVE = ("distance", "scale", "guidance_scale", "seed")


@pytest.mark.parametrize("command", sorted({*STAGES, *CONFIGS}))
def test_numbers_without_sense_are_refused_by_every_command(command):
    config = config_class(command)
    needed = {key: "x" for key, found in names_and_hints(config).items() if found.required}
    needed |= {"model": "x"} if command == "pipeline" else {}
    for key, found in names_and_hints(config).items():
        kinds = {int, float} & {found.hint, *typing.get_args(found.hint)}
        if kinds and typing.get_origin(found.hint) not in (tuple, list, dict, Literal):
            later = command == "complete" or key in LATER
            refused = ["inf", "nan"] + ["-1"] * (key.rpartition(".")[2] not in NEGATIVE and not later)
            for bad in refused:
                with pytest.raises(ValueError):
                    parse(config, {**needed, key: bad})


def test_scientific_notation_that_yaml_reads_as_a_string():
    values = yaml.safe_load("first: {lr: 1e-3}")
    assert values["first"]["lr"] == "1e-3"
    assert parse(Run, values).first.lr == 1e-3


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("first.lr=1e-3", lambda r: r.first.lr == 1e-3),
        ("first.nesterov=true", lambda r: r.first.nesterov is True),
        ("first.nesterov=False", lambda r: r.first.nesterov is False),
        ("first.betas=[0.5, 0.6]", lambda r: r.first.betas == (0.5, 0.6)),
        ("size=32,16", lambda r: r.size == (32, 16)),
        ("size=null", lambda r: r.size is None),
        ("tags=a,b", lambda r: r.tags == ("a", "b")),
        ("tags=a", lambda r: r.tags == ("a",)),
        ("tags=[]", lambda r: r.tags == ()),
        ("weights=-1,1e5", lambda r: r.weights == [-1.0, 1e5]),
        ("note=none", lambda r: r.note is None),
        ("note=a,[b=c", lambda r: r.note == "a,[b=c"),
        ("name=null", lambda r: r.name == "null"),
        ("out=a/b", lambda r: r.out == Path("a/b")),
        ("kind=b", lambda r: r.kind == "b"),
        ("labels=a: b", lambda r: r.labels == {"a": "b"}),
        ("labels={a: b, c: d}", lambda r: r.labels == {"a": "b", "c": "d"}),
        (" kind =b", lambda r: r.kind == "b"),
    ],
)
def test_override(override, read):
    assert read(parse(Run, {}, [override]))


def test_the_later_one_wins():
    assert parse(Run, {"first": {"steps": 3}}, ["first.steps=4", "first.steps=5"]).first.steps == 5
    assert parse(Run, {"first": {"steps": "nonsense"}}, ["first.steps=4"]).first.steps == 4


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"first": {"stepz": 1}}, [], r"'first\.stepz', did you mean first\.steps"),
        ({"frist": {"steps": 1}}, [], r"'frist\.steps', did you mean first\.steps"),
        ({}, ["steps=1"], r"'steps', did you mean first\.steps or second\.steps"),
        ({}, ["zzzz=1"], r"unknown setting 'zzzz'; allowed: kind, .*second\.lr.*, name"),
        ({"zzzz": {}}, [], "unknown setting 'zzzz'"),
        ({"first": 5}, [], r"'first', did you mean first\.lr"),
        ({"kind": {"x": 1}}, [], r"kind=\{'x': 1\}: expected 'a'"),
        ({}, ["steps"], "expected key=value"),
        ({}, ["=1"], "expected key=value"),
        ({}, ["first.lr=fast"], r"first\.lr='fast': expected float"),
        ({}, ["first.steps=1.5"], r"first\.steps='1\.5': expected int"),
        ({"first": {"steps": True}}, [], r"first\.steps=True: expected int"),
        ({"first": {"steps": None}}, [], r"first\.steps=None: expected int"),
        ({"first": {"steps": [1]}}, [], r"first\.steps=\[1\]: expected int"),
        ({"first": {"nesterov": 1}}, [], r"first\.nesterov=1: expected bool"),
        ({"size": [1]}, [], r"size=\[1\]: expected tuple\[int, int\] \| null"),
        ({"tags": "a"}, ["tags=[a"], r"tags='\[a': expected tuple\[str, \.\.\.\], got malformed YAML"),
        ({"kind": "c"}, [], r"kind='c': expected 'a' \| 'b'"),
        ({}, ["second.steps=0"], "^second: steps must be at least 1, got 0"),
    ],
)
def test_refusals(values, overrides, message):
    with pytest.raises(ValueError, match=message):
        parse(Run, values, overrides)


def test_refusals_do_not_print(capsys):
    with pytest.raises(ValueError):
        parse(Run, {}, ["first.lr=fast"])
    assert capsys.readouterr() == ("", "")


def test_required_settings():
    with pytest.raises(ValueError, match=r"'path' \(Path\) is required"):
        parse(Required, {"count": 1})
    with pytest.raises(ValueError, match="'count'"):
        parse(Required, {"path": "x"})
    assert parse(Required, {"path": "x", "count": None}) == Required(Path("x"), Optim(), None)
    with pytest.raises(ValueError, match=r"^steps must be"):
        parse(Optim, {"steps": 0})


def test_describe():
    lines = describe(Run).splitlines()
    name = lines.index('name="run"  (str)')
    assert lines[name + 1].startswith("    Name of the run")
    assert lines[name + 2].startswith("    ")
    assert "of this very test." in " ".join(line.strip() for line in lines[name + 1 : name + 3])
    assert "  " not in lines[name + 1].strip()
    assert lines[0].startswith("kind="), "those of the subclass come first"
    assert describe(PolicyConfig).index("order=") < describe(PolicyConfig).index("per_step=")
    assert describe(SampleStage).startswith("model=...  (Path, required)"), "required ones come first"
    assert "kind=\"a\"  ('a' | 'b')" in lines
    assert "size=null  (tuple[int, int] | null)" in lines
    assert "first.betas=[0.9, 0.95]  (tuple[float, float])" in lines
    assert lines[lines.index("first.lr=0.0003  (float)") + 1] == "    Peak learning rate."
    assert "second.steps=20  (int)" in lines
    assert "path=...  (Path, required)" in describe(Required).splitlines()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stages: {data: {size: big}}", r"x\.yaml, stage 'data': size='big': expected tuple"),
        ("stages: {data: {sise: 3}}", r"x\.yaml, stage 'data': unknown setting 'sise', did you mean size"),
        ("stages: {data: 5}", r"x\.yaml, stage 'data' must hold a mapping .* got 5"),
        ("1: a", r"unknown setting in .*x\.yaml '1': choose one of out"),
        ("stages: {1: {stage: data, sise: 3}}", r"x\.yaml, stage '1': unknown setting 'sise'"),
        ("stages: [data]", r"x\.yaml: stages must hold a mapping .* got \['data'\]"),
        ("stages: {data: {stage: [a]}}", r"unknown stage of 'data' in .*x\.yaml"),
    ],
)
def test_errors_of_an_experiment_name_file_and_stage(tmp_path, content, message):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_experiment(tmp_path / "x.yaml")


def test_home_folders_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("out: ~/runs\nstages: {tokens: {data: ~/data, tokenizer: ~/t}}")
    experiment = load_experiment("~/x.yaml")
    assert experiment.out == tmp_path / "runs"
    assert experiment.stages["tokens"][1].data == tmp_path / "data"
    assert load_experiment("~/x.yaml", ["out=~/other"]).out == tmp_path / "other"
    assert parse(LossConfig, {}, ["lpips=1", "vgg_path=~/vgg.pth"]).vgg_path == tmp_path / "vgg.pth"
    (tmp_path / "p").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/p"):
        Pipeline.from_pretrained("~/p")
    (tmp_path / "x.yaml").write_text("out: ~\nstages: {data: {}}")
    assert load_experiment("~/x.yaml").out == Path("runs/x")


def test_load_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    with pytest.raises(FileNotFoundError, match=r"a\.yaml"):
        load_yaml(path)
    for content, message in [
        ("- 1", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("a: 1\nb: {c: 1, c: 2}", r"(?s)a\.yaml.*'c' is given twice.*line 2"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!int x", r"a\.yaml is not valid YAML"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_yaml(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_yaml(path)
    path.write_text("")
    assert load_yaml(path) == {}
    path.write_text("a: &x {b: 1}\nc: {<<: *x, d: 2}")
    assert load_yaml(path) == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


def test_importing_costs_neither_pydantic_nor_torch():
    code = (
        "import sys, anyorder.settings; sys.exit(bool({'pydantic', 'torch', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_threads_convert_side_by_side():
    """They once took each other's output, and good values for bad ones."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: parse(Optim, {"lr": i / 1000, "steps": i + 1}), range(40)))
    assert [(one.lr, one.steps) for one in found] == [(i / 1000, i + 1) for i in range(40)]


NAMES = [
    "010",
    "yes",
    "1.10",
    "null",
    "1:30",
    "0x1F",
    "a, b",
    "~x",
    "1e5",
    "True",
    "é",
    "#1",
    "a: b",
    "- c",
    "5",
]


def test_texts_stay_texts(tmp_path):
    listed = json.dumps(NAMES, ensure_ascii=False)
    assert parse(Run, {}, [f"tags={listed}"]).tags == tuple(NAMES)
    assert parse(Run, {}, ["tags=010,yes,1.10,null,1:30,0x1F"]).tags == tuple(NAMES[:6])
    assert parse(Run, {}, ["tags=a, b"]).tags == ("a", "b")
    assert parse(Run, {}, ["tags='a"]).tags == ("'a",)
    assert parse(Run, {}, ['tags="a, b",c']).tags == ("a, b", "c")
    assert parse(Run, {}, ["labels=a: 010, b: yes"]).labels == {"a": "010", "b": "yes"}
    path = tmp_path / "a.yaml"
    path.write_text(f"tags: {listed}")
    assert parse(Run, load_yaml(path)).tags == tuple(NAMES)
    path.write_text("tags: [010, yes, 1.10, null, 1:30, 0x1F, 'a, b', 2024-01-01, 5, true]\nname: 0o7")
    run = parse(Run, load_yaml(path))
    assert run.tags == ("010", "yes", "1.10", "null", "1:30", "0x1F", "a, b", "2024-01-01", "5", "true")
    assert run.name == "0o7"


def test_numbers_of_yaml_and_numpy(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("first: {lr: 1e-3, steps: 7, nesterov: yes}\nsize: 32,16\nnote: null\nout: ~/x")
    run = parse(Run, load_yaml(path))
    assert (run.first.lr, run.first.steps, run.first.nesterov) == (1e-3, 7, True)
    assert (run.size, run.note, run.out) == ((32, 16), None, Path.home() / "x")
    run = parse(Run, {"first.lr": np.float32(0.5), "first.steps": np.int64(3), "size": [np.int8(1), 2]})
    assert (run.first.lr, run.first.steps, run.size) == (0.5, 3, (1, 2))
    assert parse(Run, {}, ["out=~/y"]).out == Path.home() / "y"
    for bad in ("nan", math.nan, "inf", "-Infinity", math.inf, "1e999", 10**400):
        with pytest.raises(ValueError, match=r"first\.lr=.*: expected float"):
            parse(Run, {"first": {"lr": bad}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]\n" for i in range(1, 30)), "aliases"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: " + "x" * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_hostile_yaml(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"a\.yaml.*{message}") as caught:
        load_yaml(path)
    assert "\n" not in str(caught.value)


def test_long_values_are_cut_in_messages():
    with pytest.raises(ValueError, match=r"first\.lr=x{90}\.\.\.: expected float"):
        parse(Run, {}, [f"first.lr={'x' * 1000}"])


@dataclass
class Changed:
    renamed: ClassVar[dict[str, str]] = {"spread": "min_distance", "order=own": "order=per_image"}
    removed: ClassVar[dict[str, Any]] = {"full_every": 0}
    min_distance: float = 0.0
    order: Literal["per_image", "class_mean"] = "per_image"


@dataclass
class Holder:
    renamed: ClassVar[dict[str, str]] = {"rule": "policy"}
    policy: Changed = field(default_factory=Changed)


def test_settings_that_were_renamed():
    stored = {"rule": {"spread": 2.0, "order": "own", "full_every": 0}}
    found = read_stored(Holder, stored)
    assert found == {"policy": {"min_distance": 2.0, "order": "per_image"}}
    assert parse(Holder, found) == Holder(Changed(2.0))
    assert stored == {"rule": {"spread": 2.0, "order": "own", "full_every": 0}}
    with pytest.raises(ValueError, match="full_every=3 cannot be read"):
        read_stored(Holder, {"policy": {"full_every": 3}})
    with pytest.raises(ValueError, match=r"'policy\.spread' is now called 'policy\.min_distance'"):
        parse(Holder, {}, ["policy.spread=2"])
    with pytest.raises(ValueError, match=r"'policy\.full_every' no longer exists"):
        parse(Holder, {"policy": {"full_every": 0}})


def test_options_are_settings():
    given = ["run", "--first.lr", "1", "--nesterov=no", "size=3", "--dry-run", "--data-images", "-1"]
    wanted = ["run", "first.lr=1", "nesterov=no", "size=3", "--dry-run", "data_images=-1"]
    assert as_overrides(given, ["--dry-run"]) == wanted
    for bad in (["--lr"], ["--lr", "--dry-run"]):
        with pytest.raises(ValueError, match="--lr VALUE"):
            as_overrides(bad, ["--dry-run"])
