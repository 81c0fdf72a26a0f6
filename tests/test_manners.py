"""The command line as people meet it: help, typos, wrong folders, sizes, quiet runs, run folders."""

import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from anyorder import settings
from anyorder.cli import commands, main, runs
from anyorder.files import read_manifest, write_json
from anyorder.stages.experiment import STAGES


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("manners") / "data"
    assert main.main(["data", "size=16", "max_train=8", "max_test=4", f"out={out}"]) == 0
    return out


def failed(capsys, *typed):
    assert main.main(typed) == 2
    return capsys.readouterr().err


# --- help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_begins_with_an_example_that_works(name, capsys):
    assert main.main([name, "--help"]) == 0
    example = f"anyorder {name} {commands.EXAMPLES[name]}"
    assert f"example: {example}" in capsys.readouterr().out
    if name not in ("fit", "report", "run", "verify", "ls", "clean"):  # need what is not here
        assert main.main([*shlex.split(example)[1:], "--dry-run"]) == 0


def test_help_says_what_a_group_that_is_not_given_means(capsys):
    assert main.main(["complete", "--help"]) == 0
    said = capsys.readouterr().out
    assert (
        "policy=null\n    The order to generate in; by default the pipeline's policy.\npolicy.order=" in said
    )
    assert "sampling=null\n    How tokens are sampled; by default what the pipeline says.\n" in said
    assert main.main(["orders", "--help"]) == 0
    assert "=null\n" not in capsys.readouterr().out


def test_help_shows_common_settings_and_counts_the_others(capsys):
    main.main(["train", "--help"])
    short = capsys.readouterr().out
    main.main(["train", "--help-all"])
    full = capsys.readouterr().out
    assert "train.steps=" in short
    assert "tokens=..." in short
    assert "train.beta1" not in short
    assert re.search(r"\b\d\d more settings: --help-all", short)
    assert full.index("train.steps=") < full.index("further settings:") < full.index("train.beta1=")
    assert all(f"{name}=" in full for name in settings.names(STAGES["train"]))


def test_bash_completes_commands_and_settings(capsys, tmp_path):
    assert main.main(["--completion"]) == 0
    script = tmp_path / "anyorder.bash"
    script.write_text(capsys.readouterr().out)
    ask = "source {}; COMP_WORDS=({}); COMP_CWORD={}; _anyorder; echo ${{COMPREPLY[@]}}"
    for words, wanted in [
        ("anyorder tok", "tokenizer tokens"),
        ("anyorder tokens mir", "mirror="),
        ("anyorder train overw", "overwrite="),
    ]:
        typed = ask.format(script, words, len(words.split()) - 1)
        found = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == wanted


# --- what was typed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "--dryrun", "out=x"], "did you mean --dry-run?"),
        (["data", "siez=32", "out=x"], "did you mean size"),
        (["data", "size=32x", "out=x"], "expected tuple"),
        ([], "unknown command"),
    ],
)
def test_typos_get_the_nearest_word(typed, message, capsys):
    assert message in failed(capsys, *typed, "--verbose")


@pytest.mark.parametrize(("text", "size"), [("64", (64, 64)), ("64x48", (64, 48)), ("64,48", (64, 48))])
def test_sizes(text, size):
    assert settings.parse(STAGES["data"], {}, [f"size={text}"]).size == size


def test_a_limit_of_orders_holds_for_held_out_images_too():
    given = [{"model": "m", "tokens": "t", "limit": limit} for limit in (20, 900, None)]
    parsed = [settings.parse(STAGES["orders"], values).test_limit for values in given]
    assert parsed == [20, 512, 512]


def test_sizes_in_files():
    assert settings.parse(STAGES["data"], {"size": 64}).size == (64, 64)


def test_a_wrong_folder_says_what_made_it_and_what_is_wanted(data, capsys, tmp_path):
    made = f"{data} was made by anyorder data"
    others = "anyorder tokenizer or anyorder convert or anyorder pipeline made"
    for typed, message in [
        (["tokens", f"data={data}", f"tokenizer={data}"], f"tokenizer={made}: give a folder that {others}"),
        (["train", f"tokens={data}"], f"tokens={made}: give a folder that anyorder tokens made"),
        (["tokenizer", f"data={data}", f"init={data}"], f"init={made}"),
    ]:
        assert message in failed(capsys, *typed, f"out={tmp_path}/out")
        assert not (tmp_path / "out").exists()


def test_warnings_are_said_once():
    once = main._Once()
    said = [logging.makeLogRecord({"levelno": level, "msg": "x"}) for level in (30, 30, 20, 20)]
    assert [once.filter(record) for record in said] == [True, False, True, True]


def test_quiet_runs_show_results_alone(tmp_path):
    environment = os.environ | {"NO_COLOR": "1"}
    typed = [sys.executable, "-m", "anyorder", "data", "size=16", "max_train=4", "max_test=2"]
    for flag, silent in (("-q", True), ("-v", False)):
        command = [*typed, f"out={tmp_path}/{flag}", flag]
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert found.stdout.startswith("wrote ")
        assert (found.stderr == "") == silent
        assert (" anyorder: data -> " in found.stderr) != silent


# --- run folders ------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, data):
    """A run of a data artifact, a tokenizer made from it, and a folder of somebody else."""
    shutil.copytree(data, tmp_path / "run" / "data")
    out = tmp_path / "run"
    small = [f"model.{text}" for text in ("channels=8", "multipliers=1,1", "groups=1")]
    small += ["train.steps=1", "train.batch_size=2"]
    typed = ["tokenizer", f"data={out}/data", *small, "train.eval_every=0", f"out={out}/tokenizer"]
    assert main.main(typed) == 0
    (out / "theirs" / "checkpoints").mkdir(parents=True)
    (out / "theirs" / "checkpoints" / "x.safetensors").write_text("theirs")
    write_json(out / "theirs" / "manifest.json", {"name": "an app"})
    return out


def test_ls_says_what_is_up_to_date_and_why_not(run, capsys):
    assert main.main(["ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["data", "tokenizer"]
    assert all(line.endswith("up to date") for line in lines[1:])
    manifest = read_manifest(run / "data")
    write_json(run / "data" / "manifest.json", manifest | {"fingerprint": "other"})
    assert "its data" in runs.state(run / "tokenizer")
    assert "was made again" in runs.state(run / "tokenizer")
    (run / "data" / "manifest.json").unlink()
    assert "no longer at" in runs.state(run / "tokenizer")
    (run / "data" / ".identity.json").write_text("{}")
    assert main.main(["ls", str(run)]) == 0
    assert "unfinished" in capsys.readouterr().out


def test_ls_sees_that_photos_were_added_or_are_gone(tmp_path):
    (photos := tmp_path / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(photos / f"{i}.png")
    assert main.main(["data", f"source={photos}", "size=8", f"out={tmp_path}/data"]) == 0
    assert runs.state(tmp_path / "data") == "up to date"
    Image.new("RGB", (8, 8)).save(photos / "more.png")
    assert runs.state(tmp_path / "data") == f"out of date: {photos} has changed since then"
    shutil.rmtree(photos)
    assert runs.state(tmp_path / "data") == f"its source {photos} can no longer be read"


def test_a_home_of_nobody_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it is written, should it not be refused
    assert main.main(["data", "source=sunsets", "size=16", "out=~nobody-of-this-name/data"]) != 0
    assert "Traceback" not in (said := capsys.readouterr().err)
    assert "home directory" in said


def test_what_is_watched_is_known_before_the_training(tmp_path, data, capsys):
    typed = ["tokenizer", f"data={data}", "train.steps=100000", "train.patience=2", f"out={tmp_path}/out"]
    assert main.main([*typed, "train.watch=validation_psnr"]) == 2
    text = "watch=validation_psnr is not evaluated: choose one of test_psnr, test_ssim"
    assert text in capsys.readouterr().err


def test_clean_deletes_checkpoints_of_finished_trainings_alone(run, capsys):
    assert main.main(["clean", str(run)]) == 0
    assert "add --yes" in capsys.readouterr().out
    left = run / "tokenizer" / "checkpoints"
    assert any(left.iterdir())
    (left / "mine.txt").write_text("of the user")
    assert main.main(["clean", str(run), "--yes"]) == 0
    assert "deleted" in capsys.readouterr().out
    assert [path.name for path in left.iterdir()] == ["mine.txt"]
    assert (run / "theirs" / "checkpoints" / "x.safetensors").is_file()
    assert main.main(["verify", str(run / "tokenizer")]) == 0
    assert runs.state(run / "tokenizer") == "up to date"
    (run / "tokenizer" / "config.json").unlink()
    assert "config.json is missing" in runs.state(run / "tokenizer")


def test_clean_follows_no_links_and_leaves_unfinished_work(run, tmp_path):
    (run / "tokenizer" / ".identity.json").write_text("{}")
    assert runs.checkpoints([run]) == []
    (run / "tokenizer" / ".identity.json").unlink()
    found = runs.checkpoints([run])
    manifest = read_manifest(run / "tokenizer")
    escaping = [*manifest["other_files"], "checkpoints/../../theirs/checkpoints/x.safetensors"]
    write_json(run / "tokenizer" / "manifest.json", manifest | {"other_files": escaping})
    assert runs.checkpoints([run]) == []  # such a manifest is none of this package's
    write_json(run / "tokenizer" / "manifest.json", manifest)
    assert runs.checkpoints([run]) == found
    shutil.move(run / "tokenizer" / "checkpoints", tmp_path / "elsewhere")
    (run / "tokenizer" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert runs.checkpoints([run]) == []


@pytest.mark.parametrize("name", ["ls", "clean"])
def test_run_folders_are_needed(name, tmp_path, capsys):
    assert "give one or more run folders" in failed(capsys, name)
    assert "holds no artifacts" in failed(capsys, name, str(tmp_path))


def test_bars_in_logs_of_jobs_are_not_drawn_ten_times_a_second(monkeypatch):
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert main.main(["--version"]) == 0
    assert os.environ["TQDM_MININTERVAL"] == "10"
    monkeypatch.setenv("TQDM_MININTERVAL", "1")
    assert main.main(["--version"]) == 0
    assert os.environ["TQDM_MININTERVAL"] == "1"


def test_what_comes_next_can_be_pasted(tmp_path, capsys):
    small = ["size=16", "max_train=4", "max_validation=2", "max_test=2"]
    assert main.main(["data", "source=sunsets", *small, f"out={tmp_path}/my photos/data"]) == 0
    typed = shlex.split(capsys.readouterr().out.partition("next: ")[2])
    assert typed[2:] == [f"data={tmp_path}/my photos/data", f"out={tmp_path}/my photos/tokenizer"]
