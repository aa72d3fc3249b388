"""How a report gets into its file: whole, through no link, with the mode that the file had."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prac_fx.document import job
from prac_fx.document.write import why_not_writable, write_whole
from prac_fx.report import main
from tests.report_document import document


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    secret, link = tmp_path / "secret", tmp_path / "report.json"
    secret.write_text("theirs")
    secret.chmod(0o600)
    link.symlink_to(secret)
    write_whole(link, b"ours")
    assert (secret.read_text(), _mode(secret)) == ("theirs", 0o600)
    assert (link.read_text(), link.is_symlink()) == ("ours", False)


def test_a_link_to_nothing_makes_nothing_there(tmp_path: Path) -> None:
    link = tmp_path / "report.json"
    link.symlink_to(tmp_path / "elsewhere")
    write_whole(link, b"ours")
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    path = job._own_path(str(tmp_path / "link" / "report.json"))
    assert path == tmp_path / "real" / "report.json"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_an_existing_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "report.json"
    path.touch()
    path.chmod(mode)
    write_whole(path, b"new")
    assert (path.read_bytes(), _mode(path)) == (b"new", mode)


def test_a_new_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write_whole(tmp_path / "report.json", b"new")
    assert _mode(tmp_path / "report.json") == _mode(tmp_path / "any")


def test_the_umask_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # it is the process's: a file that another thread makes meanwhile would get the wrong mode
    monkeypatch.setattr(os, "umask", None)
    write_whole(tmp_path / "report.json", b"new")


def test_threads_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    texts = [bytes([65 + number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write_whole, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in texts
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("call", ["replace", "chmod"])
def test_a_failure_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("r" * 250 + ".json")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_devices_and_pipes_are_written_to(tmp_path: Path) -> None:
    null = os.stat("/dev/null")
    write_whole(Path("/dev/null"), b"gone")
    assert os.stat("/dev/null").st_rdev == null.st_rdev
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert why_not_writable(pipe) is None
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    write_whole(pipe, b"through")
    assert reader.communicate(timeout=60)[0] == b"through"
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give a file away")
def test_a_pipe_of_somebody_else_is_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "report.json"
    os.mkfifo(pipe)
    os.chown(pipe, 65534, 65534)
    write_whole(pipe, b"new")
    assert pipe.read_bytes() == b"new"


def test_standard_output_by_its_name(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps(document()))
    command = [sys.executable, "-m", "prac_fx.report", report, "-o", "/dev/stdout"]
    with open(tmp_path / "shown", "wb") as shown:
        subprocess.run(command, stdout=shown, check=True)
    assert os.path.islink("/dev/stdout")
    assert (tmp_path / "shown").read_text().startswith("model ")


def test_the_command_writes_its_output_so_too(tmp_path: Path) -> None:
    report, secret, link = (tmp_path / name for name in ("report.json", "secret", "page.html"))
    report.write_text(json.dumps(document()))
    secret.write_text("theirs")
    link.symlink_to(secret)
    assert main([str(report), "-o", str(link)]) == 0
    assert secret.read_text() == "theirs"
    assert link.read_text().startswith("<!doctype html>")
