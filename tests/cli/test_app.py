import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from switchmamba import __version__, cli
from switchmamba.errors import CheckpointError, ConfigError, DataError, NonFiniteError

COMMANDS = Path(cli.__file__).parent


def run(*words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "switchmamba", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def failing(monkeypatch):
    """Make `switchmamba doctor` raise what is given."""

    def arrange(error: BaseException) -> None:
        def doctor() -> None:
            raise error

        monkeypatch.setattr("switchmamba.cli.doctor.doctor", doctor)

    return arrange


def test_every_file_of_commands_is_registered_and_explains_itself_with_an_example(capsys):
    registered = {*cli.COMMANDS, *cli.GROUPS}
    without_command = {"__init__", "evaluate_tasks", "model_options"}
    stems = {path.stem for path in COMMANDS.glob("*.py")} - without_command
    assert {stem.rstrip("_") for stem in stems} == registered
    pages = [(name,) for name in cli.COMMANDS]
    pages += [(group, name) for group, (_, names) in cli.GROUPS.items() for name in names]
    for words in pages:
        assert cli.main([*words, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"switchmamba {' '.join(words)} " in text.split("Options:")[0].split("\n", 1)[1], words


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands_without_importing_torch(words):
    program = (
        f"import sys; from switchmamba.cli import main; main({words!r}); sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert all(f"\n  {name} " in result.stdout for name in (*cli.COMMANDS, *cli.GROUPS))


def test_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"switchmamba {__version__}\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["dance"], "dance"),
        (["--loud"], "--loud"),
        (["doctor", "--loud"], "--loud"),
        (["doctor", "extra"], "extra"),
        (["evaluate"], "CKPT"),
        (["data"], "command"),
        (["generate", "run", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "run", "--max-tokens", "-1"], "--max-tokens"),
        (["--quiet", "--verbose", "doctor"], "--quiet"),
    ],
)
def test_a_mistyped_command_is_answered_in_one_line_with_exit_code_2(words, part, capsys):
    assert cli.main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert part in output.err and "--help" in output.err


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 3), (CheckpointError, 3), (NonFiniteError, 1)],
)
def test_an_error_for_the_user_is_one_line_with_its_exit_code(error, code, failing, capsys):
    failing(error("value 7 breaks\na rule"))
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == "error: value 7 breaks a rule\n"


def test_a_full_disk_is_one_line(failing, capsys):
    failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/metrics.jsonl"))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "error: run/metrics.jsonl: No space left on device\n"


def test_interruption_is_130(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_sigterm_unwinds_like_an_interruption_and_is_143(monkeypatch, capsys):
    unwound = []

    def doctor() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # a second one does not cut the cleaning up short
            unwound.append(True)

    monkeypatch.setattr("switchmamba.cli.doctor.doctor", doctor)
    assert cli.main(["doctor"]) == 143
    assert capsys.readouterr().err == "error: terminated\n"
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_process_that_ignores_sigterm_goes_on_ignoring_it(monkeypatch):
    monkeypatch.setattr("switchmamba.cli.doctor.doctor", lambda: signal.raise_signal(signal.SIGTERM))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert cli.main(["doctor"]) == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_fault_of_ours_keeps_its_traceback(failing):
    failing(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main(["doctor"])


def test_verbose_shows_where_an_error_came_from(failing, capsys):
    failing(DataError("bad text"))
    assert cli.main(["--verbose", "doctor"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: bad text"
    assert "Traceback (most recent call last):" in lines


@pytest.mark.parametrize(
    ("option", "shown"), [("--quiet", []), ("--verbose", ["info", "debug"]), (None, ["info"])]
)
def test_logs_go_to_stderr_at_the_chosen_level(option, shown, monkeypatch, capsys):
    logger = logging.getLogger("switchmamba")

    def doctor() -> None:
        for level in ("debug", "info", "warning"):
            getattr(logger, level)("a %s", level)

    monkeypatch.setattr("switchmamba.cli.doctor.doctor", doctor)
    assert cli.main([word for word in (option, "doctor") if word]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert sorted(output.err.splitlines()) == sorted(
        [*(f"a {level}" for level in shown), "warning: a warning"]
    )


def test_a_reader_that_goes_away_is_no_error():
    program = (
        "import sys, typer, switchmamba.cli.doctor as d; from switchmamba.cli import main\n"
        "def doctor():\n"
        "    for _ in range(10000): typer.echo('x' * 80)\n"
        "d.doctor = doctor; sys.exit(main(['doctor']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


def test_text_that_the_terminal_cannot_show_is_escaped():
    program = (
        "import sys, typer, switchmamba.cli.doctor as d; from switchmamba.cli import main\n"
        "d.doctor = lambda: typer.echo('caf\\u00e9 \\U0001f642'); sys.exit(main(['doctor']))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"caf\xe9 \\U0001f642\n", b"")


def test_python_m_switchmamba_is_the_command():
    result = run("dance")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
