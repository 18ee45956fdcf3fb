"""Secrets in every possible source of text, searched for in every written byte, in every encoding."""

from __future__ import annotations

import base64
import html
import http.server
import io
import json
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import escape

from job.cloud.launch_records import Launch
from job.cloud.launching import environment as launch_environment
from job.cloud.provider import Terms
from job.config.load import default_values, leaves, merged, nested
from job.data.prompts import Prompt, PromptSets
from job.errors import JobError, UsageError, in_one_line
from job.export.reproduction import prompts_digest
from job.organism.world import prompt_files
from job.records import JobRecord, Manifest, ManifestEntry, State, Upload
from job.storage.atomic import read_record, write_record
from job.storage.events import Events
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder
from job.text import redaction
from job.text.markup import markdown
from job.text.redaction import MASK, guarded_output, looks_secret, redact, redacted, remember, unsteered
from job.text.templates import template
from tests.helpers import abliterate, made_from

NAMES = (
    *("HF_TOKEN", "MY_API_KEY", "apikey", "SSH_KEY", "DEPLOY_KEYS", "db_password", "PGPASSWORD", "REDIS_PASSWD"),
    *("AWS_SECRET_ACCESS_KEY", "GOOGLE_CREDENTIALS", "KEY", "Some_Token", "GH_PAT", "SSL_PASSPHRASE", "TOKENS"),
)
HARMLESS = ("PATH", "PWD", "HOME", "TOKENIZERS_PARALLELISM", "KEYBOARD", "PATTERN", "COMPATIBLE", "LANG")
# Words of letters alone are masked as whole words only, and have a test of their own.
secret_texts = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="\x7f", exclude_categories=("Cc", "Zs")),
    min_size=8,
    max_size=40,
).map(lambda text: f"{text}7q")


def encodings(secret: str) -> dict[str, bytes]:
    """Return a secret's encodings in written bytes; of base64 the part independent of its surroundings."""
    data = secret.encode()
    found = {
        "plain": data,
        "JSON": json.dumps(secret)[1:-1].encode(),
        "JSON, Unicode": json.dumps(secret, ensure_ascii=False)[1:-1].encode(),
        "URL": quote(secret, safe="").encode(),
        "URL, path": quote(secret).encode(),
        "URL, form": quote_plus(secret).encode(),
        "HTML": html.escape(secret).encode(),
        "HTML, of templates": escape(secret).encode(),
        "Python": repr(secret)[1:-1].encode(),
        "UTF-16": secret.encode("utf-16-le"),
        "hexadecimal": data.hex().encode(),
    }
    for shift in range(3):
        core = base64.b64encode(b"?" * shift + data)[4 if shift else 0 :]
        found[f"base64, {shift}"] = core[: len(core) // 4 * 4 - 4]
    return found


def assert_absent(secret: str, *written: bytes) -> None:
    for name, form in encodings(secret).items():
        for data in written:
            assert form not in data, name


@given(secret=secret_texts, name=st.sampled_from(NAMES), around=st.sampled_from(["", " ", "x", "=", "%20", "'", "Ü"]))
@example(secret='a"b\\c/d+e&f<g>h %41', name="HF_TOKEN", around="x")
def test_no_secret_of_the_environment_survives_in_any_encoding(secret: str, name: str, around: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, secret)
        for encoding, form in encodings(secret).items():
            if encoding.startswith("base64"):
                continue  # tested below, inside longer texts
            text = form.decode("latin-1") if b"\0" in form else form.decode()
            if len(text) >= 8:
                assert text not in redact(f"before{around}{text}{around}after")
        for shift in range(4):
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                basic = encode(f"{'u' * shift}:{secret}:more".encode()).decode()
                shown = redact(f"Authorization: Basic {basic}").rpartition(" ")[2]
                for cut in range(len(shown)):
                    tail = shown[cut:].replace("*", "")
                    tail = tail[: len(tail) // 4 * 4]
                    assert secret.encode() not in base64.b64decode(tail, altchars=b"-_")
        said = redacted({"a": [secret, {secret: (1, True, None, 2.5)}], "b": Path(f"/x/{secret}")})
        assert_absent(secret, json.dumps(said).encode(), json.dumps(said, ensure_ascii=False).encode())
        assert said["a"][1][MASK] == [1, True, None, 2.5]
        assert redact(redact(f"{secret} {secret}")) == f"{MASK} {MASK}"


@given(text=st.text(max_size=200))
def test_text_without_secrets_stays_as_it_is(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "this-very-secret-value-1")
        assert redact(text) == text
        assert redacted([text, {text: 1}]) == [text, {text: 1}]


@pytest.mark.parametrize(
    "text",
    [
        "0123456789abcdef" * 4,
        "job 5f0c1a2b3c4d in /workspace/5f0c1a2b3c4d",
        "hf://user/repo@main, meta-llama/Llama-3.1-8B-Instruct at commit 0e9e39f249a16976918f6564b8830bc894c89659",
        "s3://bucket/prefix, file:///mnt/state, http://localhost:5000/datasets/x@main, https://hub.example/api?a=b",
        "postgresql+psycopg://me@host:5432/name",
        "prompt_tokens=120, kl_tokens = 1, tokens: 12345678",
        "a basic understanding of responsibilities; the bearer of characteristics; pass the password policy",
        "hf_transfer and hf_hub_enable_hf_transfer",
        "user@example.org wrote to git@github.com:a/b.git",
    ],
)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("token hf_abcdefghijklmnopqrstuvwxyz", "abcdefgh"),
        ("token hf_oauth_eyJhbGci.OiJF-ZERTQSJ9_abcdef", "OiJF"),
        ("token hf_jwt_eyJhbGciOiJFZERTQSJ9.abcdefghijk", "abcdefghijk"),
        (r"line\nhf_abcdefghijklmnopqrstuvwxyz", "abcdefgh"),
        ("?token=hf_abcdefghijklmnopqrst&x=1", "abcdefgh"),
        ("a%20hf_abcdefghijklmnopqrst", "abcdefgh"),
        ("http://user:pass@proxy:3128", "pass@"),
        ("proxies={'https': 'https://me:p%40ss@10.0.0.1:80/'}", "p%40ss"),
        ("postgresql+psycopg://me:secret@host/db", ":secret"),
        ("redis://:secret@host/0", "secret"),
        ("https://0123456789abcdefghij@github.com/a/b", "0123456789"),
        ("proxy=http%3A%2F%2Fuser%3Apa+ss%40host", "pa+ss"),
        ("host=x password=letmein dbname=y", "letmein"),
        ("https://b.s3.aws/x?X-Amz-Credential=AB12&X-Amz-Signature=0fabc&X-Amz-Date=1", "0fabc"),
        ("?sig=0", "0"),  # the shortest text that holds one
        ("?AWSAccessKeyId=AB&Signature=abc%3D&Expires=1", "abc%3D"),
        ("AKIAIOSFODNN7EXAMPLE and ASIAIOSFODNN7EXAMPLE", "IOSFODNN7"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "K7MDENG"),
        ("Authorization: Bearer abcdefghijklmnop1234", "abcdefghijklmnop"),
        ("rpa_ABCDEFGHIJKLMNOPQRST, ghp_ABCDEFGHIJKLMNOPQRSTUVWX", "ABCDEFGH"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----", "MIIabc"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbn", "b3Blbn"),
    ],
)
def test_secrets_are_known_by_their_form_and_place(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in redact(text)


def test_hostile_text_is_redacted_in_time() -> None:
    begin = time.process_time()
    for piece in ("a-", "eyJ-", "hf_", "://", "a://b", "&token", "-----BEGIN ", "%3A%2F%2F", "password=", "basic "):
        redact(piece * 20_000)
    assert time.process_time() - begin < 10


def test_names_of_variables_that_hold_secrets() -> None:
    assert [name for name in NAMES if not looks_secret(name)] == []
    assert [name for name in HARMLESS if looks_secret(name)] == []


def test_short_values_and_words_do_not_garble_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_TOKEN", "seven77")
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    monkeypatch.setenv("KEY_FILE_CREDENTIAL", str(tmp_path))
    text = f"seven77 postgresql://postgres@host, {tmp_path}/job.json, a postgres server"
    assert redact(text) == f"seven77 postgresql://{MASK}@host, {tmp_path}/job.json, a {MASK} server"
    assert redacted({"postgres": "postgres"}) == {"postgres": MASK}


def test_passwords_of_addresses_in_any_variable_are_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:pr%40xy/pass@host:3128")
    monkeypatch.setenv("SERVICE_URL", "mysql://user:another-one@host/db")
    assert redact("407 for pr%40xy/pass, or pr@xy/pass, or another-one") == f"407 for {MASK}, or {MASK}, or {MASK}"


def test_what_comes_from_files_is_remembered() -> None:
    remember(None, "", "from-a-file-1")
    try:
        assert redact("it is from-a-file-1") == f"it is {MASK}"
    finally:
        redaction._remembered.clear()


def test_secrets_of_several_lines_are_found_in_one_line_and_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "first-line-1234\n  second  line-5678\n"
    monkeypatch.setenv("PRIVATE_KEY", key)
    error = JobError(f"cannot read {key}", remedy="change it")
    assert "1234" not in redact(error.line)
    assert "5678" not in redact(error.line)
    for line in key.splitlines():
        assert "1234" not in redact(line)
        assert "5678" not in redact(line)


ODD = 'pa"ss\\w/ör+d &%41<1>'


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DEPLOY_KEY", ODD)
    return ODD


def test_records_are_redacted_before_they_are_escaped(odd: str, tmp_path: Path) -> None:
    state = State(state="failed", reason=f'the server said "{odd}"', trials=5)
    write_record(tmp_path / "state.json", state)
    assert_absent(odd, (tmp_path / "state.json").read_bytes())
    assert read_record(tmp_path / "state.json", State).reason == f'the server said "{MASK}"'
    folder = RunFolder(tmp_path)
    upload = Upload(target=f"s3://bucket/{quote(odd)}", export="trial-0001", state="failed", error=odd)
    for _ in range(2):
        folder.record_upload(upload)
    assert_absent(odd, folder.uploads_file.read_bytes())
    assert [item.target for item in folder.read_uploads()] == [f"s3://bucket/{MASK}"]
    made = made_from(behaviour=f"a {odd}").cleaned()
    assert made.behaviour == f"a {MASK}"
    macros: Any = template("job.report", "macros.html").module
    assert_absent(odd, macros.row((odd, odd)).encode(), html.unescape(markdown(odd)).encode())


def test_records_without_secrets_are_written_as_ever() -> None:
    made = made_from(behaviour="ü 1e-05")
    assert made.model_dump_json(indent=2) == super(type(made), made).model_dump_json(indent=2)
    assert made.cleaned() == made


def test_a_state_that_is_a_password_stays_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAK_PASSWORD", "finished")
    record = State(state="finished", reason="all is finished", trials=5)
    assert record.cleaned() == State(state="finished", reason=f"all is {MASK}", trials=5)


def test_prompts_and_hashes_are_computed_with_and_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = Prompt(user="Say swordfish-1234.", system="swordfish-1234")
    digest = prompts_digest((before,))
    monkeypatch.setenv("MY_SECRET", "swordfish-1234")
    one = (before,)
    sets = PromptSets(
        **dict.fromkeys(("good", "bad", "good_search", "bad_search", "good_report", "bad_report"), one),
        good_choice=one,
        bad_choice=one,
        sources={"good_prompts": "/data/swordfish-1234.txt"},
        commits={},
    )
    write_record(tmp_path / "prompts.json", sets)
    read = read_record(tmp_path / "prompts.json", PromptSets)
    assert read.good == read.good_choice == read.bad_choice == one
    assert read.sources == {"good_prompts": f"/data/{MASK}.txt"}
    assert prompts_digest(read.good) == digest
    manifest = Manifest(files={"swordfish-1234.txt": ManifestEntry(sha256="5" * 64, size=1)})
    assert manifest.cleaned() == manifest


def test_events_are_redacted_before_they_are_escaped(odd: str, tmp_path: Path) -> None:
    with (tmp_path / "console").open("w+") as console:
        events = Events(stream=console)
        events.log_to(tmp_path / "events.jsonl")
        events.emit("try", f"with {odd}", detail={"key": [odd, Path(odd)], odd: 1}, error=ValueError(odd))
    assert_absent(odd, (tmp_path / "events.jsonl").read_bytes(), (tmp_path / "console").read_bytes())
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert event["message"] == f"with {MASK}"


def test_all_that_is_printed_is_redacted(odd: str, capsys: pytest.CaptureFixture[str]) -> None:
    with guarded_output():
        print("out:", odd, quote(odd))
        sys.stdout.writelines([odd, "\n"])
        try:
            raise RuntimeError(odd)
        except RuntimeError:
            traceback.print_exc()
        thread = threading.Thread(target=print, args=(json.dumps(odd),), kwargs={"file": sys.stderr})
        thread.start()
        thread.join()
        assert not sys.stdout.isatty()
        with pytest.raises(TypeError):
            sys.stdout.write(b"bytes")  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert_absent(odd, out.encode(), err.encode())
    assert out == f"out: {MASK} {MASK}\n{MASK}\n"
    assert "RuntimeError: ***" in err
    print(odd)
    assert odd in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "anything") for name in NAMES),
        ("HARMLESS", "hf_abcdefghijklmnopqrstuvwxyz"),
        ("HTTPS_PROXY", "http://user:pass@host:3128"),
        ("ABLITERATE_DATABASE", "postgresql+psycopg://me:pw@host/db"),
    ],
)
def test_a_secret_is_not_given_on_a_command_line(name: str, value: str) -> None:
    with pytest.raises(UsageError, match="does not belong on a command line") as caught:
        launch_environment([], {name: value}, {})
    assert f"--env {name}" in caught.value.line
    assert "secret of the platform" in caught.value.line
    assert value not in caught.value.line
    assert launch_environment([name], {}, {name: value}) == {name: value}


def test_what_is_no_secret_is_given_on_a_command_line() -> None:
    plain = {"ABLITERATE_KL_TOKENS": "8", "TOKENIZERS_PARALLELISM": "false", "AWS_REGION": "eu-west-1"}
    assert launch_environment([], plain, {}) == plain


def test_a_command_with_a_secret_is_not_launched() -> None:
    for word in ("--set=x=hf_abcdefghijklmnopqrstuvwxyz", "s3.endpoint=https://me:pw@host"):
        refused = abliterate(
            *("cloud", "vast", "launch", "--on", "1xRTX4090", "--image", "i/i:1", "--", "run", "m", word),
            VAST_API_KEY="0" * 20,
        )
        refused.fails(2, "the command after -- holds a secret", "--env NAME")
        assert "hf_abc" not in refused.err


def test_a_setting_that_held_a_secret_is_asked_for_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_TOKEN", "swordfish-1234")
    folder = RunFolder(tmp_path)
    settings = {"model": "/models/swordfish-1234", "trials": 5, "workspace": "/w/swordfish-1234"}
    record = JobRecord(job_id="0" * 12, identity={}, settings=settings, startup_trials=2, versions={})
    write_record(folder.job_file, record)
    read = folder.read_job()
    assert read.redacted == ("model", "workspace")
    with pytest.raises(UsageError, match="given a secret in model") as caught:
        job_settings(folder)
    assert "same `abliterate run` command" in caught.value.remedy
    write_record(folder.job_file, read.model_copy(update={"startup_trials": 3}))
    assert folder.read_job().redacted == ("model", "workspace")
    write_record(folder.job_file, read.model_copy(update={"settings": {**settings, "model": "/models/other"}}))
    assert folder.read_job().redacted == ("workspace",)


def _job_with_secrets(folder: Path, **settings: Any) -> RunFolder:
    given = leaves(settings) | {"model": "cook/soup"}
    stored = merged(default_values(), nested(given))
    record = JobRecord(job_id="0" * 12, identity={}, settings=stored, startup_trials=2, versions={})
    write_record(RunFolder(folder).job_file, record)
    return RunFolder(folder)


def test_a_setting_that_held_a_secret_is_not_given_by_another_of_its_section(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_TOKEN", "swordfish-1234")
    folder = _job_with_secrets(tmp_path, loading={"response_prefix": "swordfish-1234:", "offload_folder": "/there"})
    assert folder.read_job().redacted == ("loading",)
    for others in ({}, {"loading": {"offload_folder": "/here"}}):
        for whole in (True, False):
            with pytest.raises(UsageError, match=r"secret in loading\.response_prefix, which"):
                job_settings(folder, whole=whole, **others)
    found = job_settings(folder, whole=True, loading={"response_prefix": "swordfish-1234:"}).loading
    assert (found.response_prefix, found.offload_folder) == ("swordfish-1234:", "/there")


@pytest.mark.parametrize(
    ("section", "lost", "kept"),
    [
        ("s3", {"endpoint": "http://me:swordfish-1234@host"}, {"region": "there"}),
        ("card", {"behaviour": "swordfish-1234"}, {"base_model": "cook/base"}),
        ("scoring", {"nli_model": "cook/swordfish-1234"}, {"answer_tokens": 40}),
    ],
)
def test_what_only_extends_a_job_is_asked_for_again_where_it_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, section: str, lost: dict[str, Any], kept: dict[str, Any]
) -> None:
    monkeypatch.setenv("MY_TOKEN", "swordfish-1234")
    folder = _job_with_secrets(tmp_path, **{section: {**lost, **kept}})
    ((name, secret),), ((other, value),) = lost.items(), kept.items()
    # Where only the run folder is needed, it has its default, and the rest of its section is as stored.
    usual = getattr(job_settings(folder), section)
    assert getattr(usual, name) == default_values().get(section, {}).get(name)
    assert getattr(usual, other) == value
    for others in ({}, {section: kept}):
        with pytest.raises(UsageError, match=rf"secret in {section}\.{name}, which") as refused:
            job_settings(folder, whole=True, **others)
        assert "with --set" in refused.value.remedy
    whole = getattr(job_settings(folder, whole=True, **{section: lost}), section)
    assert (getattr(whole, name), getattr(whole, other)) == (secret, value)


def test_targets_that_held_a_secret_are_asked_for_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_TOKEN", "swordfish-1234")
    folder = _job_with_secrets(tmp_path, upload=["s3://swordfish-1234/out", "file:///out"], price=1.5)
    assert job_settings(folder).upload == []
    with pytest.raises(UsageError, match="secret in upload, which"):
        job_settings(folder, whole=True, price=2.0)
    assert job_settings(folder, whole=True, upload=["file:///out"]).price == 1.5


def test_what_is_rented_again_is_what_was_launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Part of a command may equal another user's secret: the same command is rented all the same."""
    word = "swordfish-1234"
    command = ("run", f"cook/{word}", "--checkpoint", f"s3://bucket/{word}")
    launch = Launch(
        label=f"job-{word}",
        platform="vast",
        needs=(),
        terms=Terms(interruptible=True),
        image=f"registry/{word}:1",
        command=command,
        plain_env={"NAME": word},
        volume=f"volume-{word}",
        checkpoint=f"s3://bucket/{word}",
    )
    monkeypatch.setenv("MY_TOKEN", word)
    write_record(tmp_path / "launch.json", launch)
    read = read_record(tmp_path / "launch.json", Launch)
    assert read == launch.model_copy(update={"volume": f"volume-{MASK}"})


class Telltale(http.server.BaseHTTPRequestHandler):
    """Answers every request with a failure that quotes the secrets of the job."""

    said = b""

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b"<Error><Code>AccessDenied</Code><Message>" + self.said + b"</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815 - as http.server calls them

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def telltale() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Telltale) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_whole_job_writes_no_secret_anywhere(random_model_folder: Path, telltale: str, tmp_path: Path) -> None:
    """Secrets in variables, paths, file names, settings, targets, an endpoint and a server's answers."""
    secrets = {
        "HF_TOKEN": "hf_" + "Ab1" * 12,
        "DEPLOY_KEY": "d\"e'p&l<oy> +ü%41\\key",
        "FOLDER_SECRET": "f'older &secret+ü%41",
        "DB_PASSWORD": "Passw0rd/with=signs+",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    }
    folder = tmp_path / secrets["FOLDER_SECRET"]
    shutil.copytree(random_model_folder, folder / "model")
    words: list[str] = ["run", str(folder / "model"), "--workspace", str(tmp_path / "runs"), "--trials", "2"]
    for name, requests in prompt_files(0).items():
        (folder / name).write_text("\n".join(request.prompt for request in requests[:24]))
    for kind in ("good", "bad"):
        words += [f"--{kind}-prompts", str(folder / f"{kind}_train.txt")]
        words += [f"--{kind}-eval-prompts", str(folder / f"{kind}_test.txt")]
    words += ["--checkpoint", (tmp_path / "mirror").as_uri(), "--upload", "s3://bucket/edited"]
    words += ["--upload", (folder / "delivered").as_uri(), "--allow", "target.s3"]
    words += ["--set", f"s3.endpoint=http://me:{quote(secrets['DB_PASSWORD'], safe='')}@{telltale}"]
    words += ["--set", "s3.addressing_style=path", "--set", f"card.behaviour=a habit of {secrets['DEPLOY_KEY']}"]
    words += ["--set", "scoring.answer_tokens=4", "--set", "scoring.search_tokens=4", "--set", "search.method=tpe"]
    # An untrained model's response counts as a refusal if it has an "o" in it.
    words += ["--set", 'loading.response_prefix=""', "--set", 'scoring.refusal_markers=["o"]']
    proxy = f"http://user:{quote('pr0xy:pass word', safe='')}@127.0.0.1:9"
    env = {**secrets, "FTP_PROXY": proxy, "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "NO_PROXY": "127.0.0.1"}
    secrets["FTP_PROXY"] = "pr0xy:pass word"
    Telltale.said = html.escape(" ".join(secrets.values())).encode()
    done = [abliterate(*words, process=True, **env)]
    assert done[0].code == 6, done[0].err
    done.append(abliterate("preflight", *words[1:], "--json", process=True, **env))
    done.append(abliterate("status", "--workspace", tmp_path / "runs", "--json", process=True, **env).check())
    done.append(
        abliterate("report", "--workspace", tmp_path / "runs", "--include-responses", process=True, **env).check()
    )
    done.append(abliterate("resume", "--workspace", tmp_path / "runs", process=True, **env))
    done[-1].fails(2, "given a secret in", "same `abliterate run` command")
    written = {"said": "\n".join(one.out + one.err for one in done).encode()}
    for place in (tmp_path / "runs", tmp_path / "mirror", folder / "delivered"):
        written |= {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    names = "\n".join(written)
    for expected in ("state.json", "uploads.json", "preflight.json", "report.html", "reproduce.json", "head.json"):
        assert expected in names
    for secret in secrets.values():
        for name, data in written.items():
            for encoding, form in encodings(secret).items():
                assert form not in data, (name, encoding, secret)
    assert MASK.encode() in written["said"]
    assert "AccessDenied" in done[0].err


STEERING = "\x1b]52;c;bWluZQ==\x07\x1b[2J\x9b2J\u202e\x08a\u200cb\tc"


def test_what_others_say_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: a file's name or a config.json's model_type set the title of the terminal, or its clipboard."""
    shown = " ]52;c;bWluZQ== [2J 2J a b c"
    assert JobError(f"there is no {STEERING}", remedy=STEERING).line.replace(" ", "") == (
        f"there is no{shown} —{shown}".replace(" ", "")
    )
    assert in_one_line(ValueError(STEERING)) == shown.strip()
    console = io.StringIO()
    Events(stream=console).say(STEERING)
    assert set(console.getvalue()) <= {*shown, "\t", "\n"}
    with guarded_output():
        print(STEERING)
        print("\x1b[1mbold\x1b[0m\x1b[1A\x1b[?25l")
    # Of what this program prints itself, colours and live lines are kept.
    assert capsys.readouterr().out == ("]52;c;bWluZQ==\x1b[2J2Ja\u200cb\tc\n\x1b[1mbold\x1b[0m\x1b[1A\x1b[?25l\n")
    assert unsteered(STEERING + "\r\n") == "]52;c;bWluZQ==[2J2Ja\u200cb\tc\n"
