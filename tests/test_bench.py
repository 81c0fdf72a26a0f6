"""The benchmark at sizes that take no time: what is measured and said, never how fast."""

import json
from functools import partial

import pytest
import torch

from anyorder.bench import bench as bench_module
from anyorder.bench import workloads
from anyorder.bench.bench import against, load_result, tables
from anyorder.bench.memory import peak_memory
from anyorder.bench.workloads import MEMORY, WORKLOADS, BenchConfig, Subject, ceilings, matmul_name, workload
from anyorder.cli import main as cli
from anyorder.inference.device import device, fast_dtype
from anyorder.models import compiled
from anyorder.models.architecture import Architecture
from anyorder.settings import parse

TINY = (
    "model.depth=1", "model.width=32", "model.heads=2", "grid=2,3", "vocab_size=8", "batch_size=2",
    "images=2", "tokenizer.channels=4", "tokenizer.multipliers=1,2", "triad_mib=1", "repeats=1", "chunk=4",
)  # fmt: skip
SWEEP = ("over.batch_size=1,2", "over.grid=3", "over.vocab_size=8", "over.depth=1")
RATES = {"seconds", "spread (%)", "images/s", "GFLOP", "GB", "GFLOP/s", "GB/s"}
SHARES = {"share of matmul (%)", "share of attainable (%)", "bound by", "relative to a fixed order"}


@pytest.fixture(autouse=True, scope="module")
def _no_time():
    """One run makes a measurement, however short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_module, "SHORTEST", 0)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Where a result with every sweep was written."""
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    assert cli.main(["bench", f"out={out}", "memory=2,4", *TINY, *SWEEP]) == 0
    return out


def measured():
    """Names of the workloads in a result: with bfloat16, sampling is measured in float32, too."""
    again = [name for name in WORKLOADS if name.startswith("sampling")]
    bf16 = fast_dtype(device(), True) != torch.float32
    return [*WORKLOADS, *(f"{name}, float32" for name in again if bf16)]


def test_sampling_is_put_beside_a_fixed_order_in_both_dtypes(monkeypatch):
    monkeypatch.setenv("ANYORDER_BF16", "on")
    only = ("sampling, fixed order", "sampling, groups of 4", "teacher-forced scoring")
    settings = {"only": only, "repeats": 1, "images": 2, "batch_size": 2, "vocab_size": 8, "grid": (2, 3)}
    config = BenchConfig(**settings, triad_mib=1, model=Architecture(depth=1, width=32, heads=2))
    rows = {row["workload"]: row for row in bench_module.measure(config)["rows"]}
    assert list(rows) == [*only, *(f"{name}, float32" for name in only[:2])]
    for dtype in ("", ", float32"):
        fixed, groups = (rows[name + dtype] for name in only[:2])
        assert fixed["relative to a fixed order"] == 1
        assert groups["relative to a fixed order"] == pytest.approx(groups["seconds"] / fixed["seconds"])
    assert rows[only[2]]["relative to a fixed order"] is None


def test_the_result_holds_everything(written):
    result = load_result(written)
    assert {"config", "device", "dtype", "versions", "ceilings", "rows", "sweeps", "memory"} == set(result)
    assert [row["workload"] for row in result["rows"]] == measured()
    for row in result["rows"]:
        assert set(row) == {"workload"} | RATES | SHARES
        assert min(row[key] for key in RATES - {"spread (%)"}) > 0
    for row in result["ceilings"]:
        assert set(row) == {"ceiling"} | RATES
        assert row["images/s"] is None
    assert [len(points) for points in result["sweeps"].values()] == [2, 1, 1, 1]
    for points in result["sweeps"].values():
        assert all([row["workload"] for row in point["rows"]] == measured() for point in points)
    assert [point["value"] for point in result["sweeps"]["grid"]] == [9]
    # What was measured already is not measured again.
    assert result["sweeps"]["depth"][0]["rows"] == result["rows"]
    assert result["sweeps"]["batch_size"][1]["ceilings"] == result["ceilings"]
    assert result["sweeps"]["batch_size"][0]["rows"] != result["rows"]
    assert len(tables(result)) == 2 + 4 + 1
    assert written.with_suffix(".png").is_file()


def test_decoding_may_be_compiled(tmp_path, monkeypatch):
    compile_decoding = partial(compiled.compile_decoding, backend="eager")
    monkeypatch.setattr(workloads, "compile_decoding", compile_decoding)
    runs = []
    run = compiled.CompiledBlocks.__call__
    monkeypatch.setattr(compiled.CompiledBlocks, "__call__", lambda *args: runs.append(0) or run(*args))
    command = ["bench", f"out={tmp_path}/bench.json", "memory=2", 'only=["sampling, inferred order"]', *TINY]
    assert cli.main(command) == 0
    assert not runs
    assert cli.main([*command, "compile=true"]) == 0
    assert runs
    assert load_result(tmp_path / "bench.json")["config"]["compile"] is True


def test_shares_are_of_what_was_measured(written):
    result = load_result(written)
    name = matmul_name(fast_dtype(device(), True), 12)
    product = next(row for row in result["ceilings"] if row["ceiling"] == name)
    memory = next(row for row in result["ceilings"] if row["ceiling"] == MEMORY)
    row = result["rows"][0]
    assert row["share of matmul (%)"] == pytest.approx(100 * row["GFLOP/s"] / product["GFLOP/s"])
    least = max(row["GFLOP"] / product["GFLOP/s"], row["GB"] / memory["GB/s"])
    assert row["share of attainable (%)"] == pytest.approx(100 * least / row["seconds"])


def test_the_median_counts_and_the_spread_is_shown(monkeypatch):
    times = iter([9.0, 9.0, 1.0, 4.0, 2.0])
    monkeypatch.setattr(bench_module, "_seconds", lambda run, calls=1: next(times))
    work = ceilings(Subject(parse(BenchConfig, {}, TINY)))[MEMORY]
    seconds = bench_module._times({"work": work}, 3)  # the first two are the warm-up
    assert seconds == {"work": [1.0, 4.0, 2.0]}
    assert bench_module._row(work, seconds["work"])["seconds"] == 2.0
    assert bench_module._row(work, seconds["work"])["spread (%)"] == 150.0


def test_short_work_is_repeated_in_one_measurement(monkeypatch):
    monkeypatch.setattr(bench_module, "SHORTEST", 0.02)
    times = iter([0.01, 0.002])
    monkeypatch.setattr(bench_module, "_seconds", lambda run: next(times))
    assert bench_module._warm_up(lambda: None) == 10
    monkeypatch.setattr(bench_module, "_seconds", lambda run: 3.0)
    assert bench_module._warm_up(lambda: None) == 1


def test_inputs_are_never_zeros():
    torch.manual_seed(0)
    subject = Subject(parse(BenchConfig, {}, TINY))
    for top in ceilings(subject).values():
        result = top.run()
        assert (result != 0).float().mean() > 0.99
    assert all((p != 0).any() for p in subject.model.parameters() if p.ndim == 2)
    assert subject.tokens.unique().numel() > 1


def test_every_workload_runs_and_says_what_it_costs():
    subject = Subject(parse(BenchConfig, {}, TINY))
    for name in WORKLOADS:
        work = workload(name, subject)
        work.run()
        assert min(work.cost.flops, work.cost.bytes, work.images) > 0, name
    inferred, extraction = (
        workload(name, subject) for name in ("sampling, inferred order", "order extraction")
    )
    assert (inferred.cost.flops, inferred.cost.bytes) == (extraction.cost.flops, extraction.cost.bytes)


def test_only_measures_what_is_asked_for(tmp_path):
    out = tmp_path / "b.json"
    assert cli.main(["bench", f"out={out}", "only=training step", "memory=", *TINY]) == 0
    result = load_result(out)
    assert [row["workload"] for row in result["rows"]] == ["training step"]
    assert result["memory"] == []
    assert not out.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["only=training stop"], "did you mean 'training step'"),
        (["repeats=0"], "repeats must be >= 1, got 0"),
        (["triad_mib=0"], "triad_mib must be >= 1"),
        (["over.depth=1,0"], "depth must list numbers >= 1"),
        (["over.width=1"], "unknown setting 'over.width'"),
        (["memory=0"], "memory must list numbers >= 1"),
        (["grid=0,3"], "at least one row"),
        (["tokenizer.channels=0"], "channels must be at least 1"),
        (["against=nowhere.json"], "nowhere.json"),
        (["--against"], "--against VALUE"),
        (["new.json"], "against=OLD.json"),
        (["new.json", "repeats=1", "against=old.json"], "without settings"),
    ],
)
def test_bad_settings_are_refused(settings, said, capsys):
    assert cli.main(["bench", *settings]) == 2
    assert said in capsys.readouterr().err


# --- comparison


@pytest.mark.parametrize("spelled", [["--against", "OLD"], ["--against=OLD"], ["against=OLD"]])
def test_two_files_are_compared(written, spelled, tmp_path, capsys):
    new = load_result(written)
    for row in new["rows"]:
        row["seconds"] /= 2
        row["share of matmul (%)"] *= 2
    (tmp_path / "new.json").write_text(json.dumps(new))
    spelled = [text.replace("OLD", str(written)) for text in spelled]
    assert cli.main(["bench", str(tmp_path / "new.json"), *spelled]) == 0
    assert "ratio of time" in capsys.readouterr().out
    rows = {row["workload"]: row for row in against(new, load_result(written)).rows}
    assert rows["training step"]["ratio of time"] == 0.5
    assert rows["training step"]["ratio of share of matmul"] == 2
    assert rows["training step"]["ratio of share of attainable"] == 1
    assert rows["tokenizer encode, positions, N = 9"]["ratio of time"] == 1


def test_what_is_measured_is_compared(written, tmp_path, capsys):
    settings = [f"out={tmp_path}/new.json", "only=tokenizer decode", "memory=", *TINY]
    assert cli.main(["bench", *settings, "--against", str(written)]) == 0
    compared = capsys.readouterr().out.split("written to")[1]
    assert "tokenizer decode" in compared
    assert "training step" not in compared


def test_results_of_other_sizes_are_not_compared(written, tmp_path):
    new, old = load_result(written), load_result(written)
    new["config"]["model"]["depth"] = 3
    with pytest.raises(ValueError, match=r"different sizes: model\.depth is 3 and 1;"):
        against(new, old)
    new = load_result(written) | {"rows": [], "sweeps": {}}
    with pytest.raises(ValueError, match="no workload is in both"):
        against(new, old)
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="not a result of anyorder bench"):
        load_result(tmp_path / "other.json")


def test_results_of_older_versions_are_compared(written):
    """Settings, columns and rows that did not exist yet are at their defaults or missing."""
    old = load_result(written)
    new = parse(BenchConfig, {}, [*TINY, "tokenizer.channels=32", "tokenizer.multipliers=1,2,4"])
    del old["config"]["tokenizer"], old["sweeps"], old["ceilings"], old["memory"]
    for row in old["rows"]:
        del row["share of attainable (%)"]
    result = load_result(written)
    result["config"]["tokenizer"] = vars(new.tokenizer)
    row = against(result, old).rows[0]
    assert row["ratio of time"] == 1
    assert row["ratio of share of attainable"] is None


# --- memory


def peaks(sides: tuple[int, ...], *settings: str) -> list[float]:
    config = parse(BenchConfig, {}, [*TINY, *settings])
    return [row["peak (MiB)"] for row in peak_memory(Subject(config), sides)]


def test_memory_grows_in_a_line_with_positions():
    first, second, third = peaks((12, 16, 20), "chunk=16")
    slope = ((third - second) / (400 - 256)) / ((second - first) / (256 - 144))
    assert 0.9 < slope < 1.2  # of a square it would be 1.64


def test_memory_grows_with_the_chunk():
    few, many = (peaks((4,), "vocab_size=4096", f"chunk={chunk}")[0] for chunk in (4, 16))
    logits = 2 * (16 - 4) * 4096 * 4 / 2**20
    assert few + logits < many < few + 10 * logits


def test_memory_is_at_least_what_is_counted():
    subject = Subject(parse(BenchConfig, {}, TINY))
    (row,) = peak_memory(subject, (4,))
    size, width = fast_dtype(device(), True).itemsize, subject.config.model.width
    assert row["positions"] == 16
    assert row["cache (MiB)"] == size * 2 * subject.config.model.depth * 2 * 16 * width / 2**20
    assert row["candidates (MiB)"] == size * 2 * 16 * width / 2**20
    assert row["chunk (MiB)"] == 4 * 2 * 4 * 8 / 2**20
    assert row["peak (MiB)"] > row["cache (MiB)"] + row["candidates (MiB)"] + row["chunk (MiB)"]
    assert peak_memory(subject, (4,)) == [row]
