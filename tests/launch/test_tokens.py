"""What is sent of the environment's token, and what mends it where a cluster wants another."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.errors import ClusterError
from rayft.launch.tokens import headers, refused


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without Ray's file, in an environment without a token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_tokens_come_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert headers() == {}
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ClusterError, match=r"RAY_AUTH_TOKEN_PATH=.*No such file"):
        headers()
    (tmp_path / "token").write_text("abc\n")
    assert headers() == {"Authorization": "Bearer abc"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "def")
    assert headers() == {"Authorization": "Bearer def"}
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # Ray's client sends it by itself
    assert headers() == {}


@pytest.mark.parametrize("token", ["ab\ncd", "schlüssel", "two words", "a\x00b"])
@pytest.mark.parametrize("mode", ["", "token"])
def test_what_no_header_can_carry_is_named_by_its_source_and_not_shown(
    token: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    file = tmp_path / "token"
    file.write_text(token, encoding="utf-8")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with pytest.raises(ClusterError, match=rf"^RAY_AUTH_TOKEN_PATH={file}: not a token; ") as raised:
        headers()
    assert token not in str(raised.value)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterError, match=rf"^RAY_AUTH_TOKEN_PATH={file}: not a token but a file of bytes"):
        headers()
    if "\x00" not in token:  # which no variable can hold
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        with pytest.raises(ClusterError, match=r"^RAY_AUTH_TOKEN: not a token; "):
            headers()


TOKEN, MODE = {"RAY_AUTH_TOKEN": "secret"}, {"RAY_AUTH_MODE": "token"}
NONE = "head asks for a token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that holds it"
WITH_MODE = NONE.replace("set ", "set RAY_AUTH_MODE=token, and ")
WRONG = "head refuses the token that {} gives; it has to be the one that the cluster was started with"
UNSENT = "head asks for a token; with RAY_AUTH_MODE=token in the environment that of {} is sent"
FILE = "~/.ray/auth_token"


@pytest.mark.parametrize(
    ("variables", "file", "asking", "joining"),
    [
        ({}, False, NONE, WITH_MODE),
        ({}, True, UNSENT.format(FILE), UNSENT.format(FILE)),
        (MODE, False, NONE, NONE),
        (MODE, True, WRONG.format(FILE), WRONG.format(FILE)),
        (TOKEN, True, WRONG.format("RAY_AUTH_TOKEN"), UNSENT.format("RAY_AUTH_TOKEN")),
        (TOKEN | MODE, True, WRONG.format("RAY_AUTH_TOKEN"), WRONG.format("RAY_AUTH_TOKEN")),
    ],
    ids=str,
)
def test_what_is_missing_is_named_and_no_token_shown(
    home: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], file: bool, asking: str, joining: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if file:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("secret")
    assert (refused("head"), refused("head", joining=True)) == (asking, joining)


def test_a_file_that_is_not_there_is_not_called_a_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nope")
    with pytest.raises(ClusterError, match=r"^RAY_AUTH_TOKEN_PATH=/nope: No such file or directory$"):
        refused("head")
