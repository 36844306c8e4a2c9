"""The command `detkit style` goes with its folder."""

import importlib

import pytest

from detkit.cli import commands, main


def test_a_command_of_the_zoo_goes_with_its_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "style" in commands()
    monkeypatch.setattr(importlib.import_module("detkit.zoo"), "__path__", [])
    assert "style" not in commands()
    assert main(["style", "style"]) == 1
    assert "There is no command 'style'" in capsys.readouterr().err
    assert main(["infer", "style.yaml"]) == 1
    assert capsys.readouterr().err.endswith("Commands that take a config: detkit check, detkit train.\n")
