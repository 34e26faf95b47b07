"""The commands that README and docs print are run as printed, where they need no model and no server.

The measured files of the pages (``mine/…``) are the shipped profiles and a made trace that fits them.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wispprof import doctor
from wispprof.artifacts import bundled_path, load_profile, save_trace
from wispprof.cli import app

sys.path.append(str(Path(__file__).parents[1] / "fitting"))

from synthetic_traces import synthetic_trace

ROOT = Path(__file__).parents[2]
CHEAP = ("fit", "traffic", "plan", "report", "profile", "reproduce")
"""In the order in which one needs the other's files."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder after the measuring half of the README."""
    place = tmp_path_factory.mktemp("reader")
    (place / "mine").mkdir()
    drafts = ("edge", "1b", "3b")  # one machine's, as the pages name them
    for name, shipped in (
        ("server", "reference-pair"),
        *((draft, "reference-draft") for draft in drafts),
    ):
        for ending in (".jsonl", ".manifest.json"):
            source = bundled_path(f"profiles/epyc-2core-{shipped}{ending}")
            shutil.copy(source, place / "mine" / f"{name}{ending}")
    rows = "".join(f"2024-05-10 10:00:{n:02d}+00:00,300,40\n" for n in range(20))
    (place / "seen.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    seen = {"prompt": 300, "output": 40, "prefix": [7], "drafted": [20, 12], "accepted": [15, 8]}
    logged = [json.dumps({"arrival_s": n} | seen) + "\n" for n in range(20)]
    (place / "requests.jsonl").write_text("".join(logged))
    model = load_profile(place / "mine" / "server").manifest.model
    trace = replace(synthetic_trace(), target=model.id, tokenizer_hash=model.tokenizer_hash)
    for name in ("trace", "1b-trace", "3b-trace"):
        save_trace(trace, place / "mine" / f"{name}.jsonl")
    return place


def printed() -> list[str]:
    """Cheap command lines of all pages, each once, those that make files before those that read them."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages if page.name != "cli.md")
    lines = [found.split("  #")[0].strip() for found in re.findall(r"^ *(wispprof .*)$", text, re.M)]
    cheap = [line for line in dict.fromkeys(lines) if line.split()[1] in CHEAP]
    # An update needs a step log of a server that ran.
    cheap = [line for line in cheap if "--update" not in line]
    return sorted(cheap, key=lambda line: ("--out" not in line, CHEAP.index(line.split()[1])))


def test_commands_run_as_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    commands = printed()
    assert len(commands) >= 5
    for line in commands:
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, f"{line}: {done.output}"
    assert (folder / "mine" / "plan.json").exists()
    assert (folder / "mine" / "report.html").exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the page's own tool")
def test_keys_and_certificate_of_the_pages_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deploy's openssl lines make what its doctor line approves. Negative control: before, it does not."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "deploy.md").read_text()
    found = re.findall(r"^(wispprof doctor .*)$", page, re.M)
    assert len(found) == 1
    asked = shlex.split(found[0])[2:]
    values = dict(zip(asked[::2], asked[1::2], strict=True))
    context = doctor.DoctorContext(
        host=values["--host"],
        api_key_file=Path(values["--api-key-file"]),
        tls_cert=Path(values["--tls-cert"]),
        tls_key=Path(values["--tls-key"]),
    )
    checks = (doctor.api_keys, doctor.tls)
    assert {found.status for found in doctor.examine(context, checks)} == {"fail"}
    lines = re.findall(r"^((?:openssl|cp|for user) .*)$", page, re.M)
    assert len(lines) == 3
    for line in lines:
        subprocess.run(["bash", "-c", line], check=True, capture_output=True, timeout=60)
    assert {found.status for found in doctor.examine(context, checks)} == {"ok"}
    assert (tmp_path / "ca.pem").read_text() == (tmp_path / "cert.pem").read_text()


def test_settings_of_the_page_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one entry misspelt."""
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "config.md").read_text(), re.S)
    for text, code in ((block, 0), (block.replace("port", "prot"), 1)):
        Path("wispprof.toml").write_text(text)
        done = CliRunner().invoke(app, ["reproduce", "configspec", "--json"])
        assert done.exit_code == code, done.output


def test_negative_control_a_command_without_its_file_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, shlex.split("wispprof plan show mine/plan.json")[1:])
    assert done.exit_code == 1
