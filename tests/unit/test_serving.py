"""What ``oatlite serve-oracle`` refuses, where it puts its workers, and what a worker loads."""

import ipaddress
import socket
from dataclasses import replace

import numpy as np
import pytest
from mosec import ClientError, ValidationError
from oatlite_cli.main import main
from oats_feedback import read_scores, reward_body
from small_folders import byte_tokenizer, save_model
from small_pairrm import save_pairrm

from oatlite.config.schema import OracleConfig
from oatlite.errors import ConfigError, OracleError
from oatlite.oracles import serving
from oatlite.oracles.feedback import decode_request, decode_verdicts, encode_comparison
from oatlite.oracles.server import Gate, answers, load, traits
from oatlite.oracles.server_settings import NOTES, READY, ServerSettings, WorkerSettings, environment
from oatlite.oracles.serving import Place, ServeOptions, place

OPTIONS = ServeOptions(
    oracle=OracleConfig(path=("model",)),
    devices=None,
    workers=None,
    devices_per_worker=1,
    host="127.0.0.1",
    port=8000,
    max_batch=8,
    max_wait_ms=5,
    timeout_s=60,
    max_request_mib=4,
    allow_anyone=False,
)
FOUR = ["H100"] * 4


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OATLITE_ORACLE_TOKEN", raising=False)
    monkeypatch.setattr(serving, "gpu_names", list)


# Places


@pytest.mark.parametrize(
    ("changes", "name", "gpus", "expected"),
    [
        ({}, "model", [], [Place("cpu", "")]),
        ({"workers": 3}, "model", [], [Place("cpu", "")] * 3),
        ({"devices": "cpu", "workers": 2}, "model", FOUR, [Place("cpu", "")] * 2),
        ({}, "model", FOUR[:2], [Place("cuda", "0"), Place("cuda", "1")]),
        ({}, "file.py:score", FOUR, [Place("cpu", "")]),
        ({"devices": "3, 1"}, "model", FOUR, [Place("cuda", "3"), Place("cuda", "1")]),
        ({"devices_per_worker": 2}, "model", FOUR, [Place("auto", "0,1"), Place("auto", "2,3")]),
    ],
)
def test_a_worker_has_a_place(changes, name, gpus, expected):
    assert place(replace(OPTIONS, **changes), name, gpus) == expected


def test_gpus_are_numbered_among_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    assert place(replace(OPTIONS, devices="1"), "model", FOUR[:2]) == [Place("cuda", "GPU-abc")]


@pytest.mark.parametrize(
    ("changes", "gpus", "words"),
    [
        ({"devices": "0"}, [], "no GPU here; type --devices cpu"),
        ({"devices": "0,4"}, FOUR, "GPUs 0 to 3 are here"),
        ({"devices": "0,0"}, FOUR, "as in 0,1, or cpu"),
        ({"devices": "gpu"}, FOUR, "as in 0,1, or cpu"),
        ({"devices": ""}, FOUR, "as in 0,1, or cpu"),
        ({"devices": "0,1,2", "devices_per_worker": 2}, FOUR, "cannot be shared out 2 to a worker"),
        ({"devices_per_worker": 2}, [], "a CPU is one device"),
        ({"workers": 2}, FOUR, "--devices cpu"),
    ],
)
def test_places_that_are_not_there_are_refused(changes, gpus, words):
    with pytest.raises(ConfigError) as error:
        place(replace(OPTIONS, **changes), "model", gpus)
    assert words in str(error.value)


# The command line


def refused(capsys, *arguments):
    assert main(["serve-oracle", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_a_port_in_use_is_refused(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(capsys, "--model", "m", "--port", str(port))
        assert f"cannot listen at 127.0.0.1:{port}: address already in use; type another --port" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "remote"], "the oracle remote is a server already"),
        (["--model", "judge"], "the oracle judge is a server already"),
        (["--model", "m", "--devices", "0"], "--devices cpu"),
        (["--model", "m", "--host", "0.0.0.0"], "OATLITE_ORACLE_TOKEN, or type --allow-anyone"),
        (["--model", "m", "--host", "::1"], "no IPv4 address"),
        (["--model", "m", "--host", "no.such.host.invalid"], "no IPv4 address"),
        (["--model", "m", "--host", "192.0.2.1", "--allow-anyone"], "cannot listen at 192.0.2.1:8000"),
        (["--model", "m", "--port", "0"], "--port"),
        (["--model", "m", "--max-batch", "0"], "--max-batch"),
        ([], "--model"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_a_token_opens_the_door_to_other_machines(capsys, monkeypatch):
    monkeypatch.setenv("OATLITE_ORACLE_TOKEN", "t")
    said = refused(capsys, "--model", "m", "--host", "192.0.2.1")
    assert "cannot listen" in said, "it is not this machine's address; the token was enough"


def test_it_listens_to_this_machine_alone_unless_told():
    from oatlite_cli.main import app_for
    from typer.main import get_command

    command = get_command(app_for(["serve-oracle"])).commands["serve-oracle"]
    assert ipaddress.ip_address(command.make_context("x", ["--model", "m"]).params["host"]).is_loopback


# Workers


def settings(name, device="cpu", index=0, **oracle):
    options = OracleConfig(path=(str(name),), **oracle).model_dump(mode="json")
    return WorkerSettings(index=index, device=device, mask="", threads=1, oracle=options, notes="/nowhere")


def test_settings_cross_as_json():
    from dataclasses import asdict
    from json import dumps

    server = ServerSettings(
        address="127.0.0.1",
        port=1,
        timeout_s=0.5,
        max_request_bytes=7,
        max_batch=2,
        max_wait_ms=3,
        folder="/f",
        workers=[settings("m"), settings("n", dtype="float32")],
    )
    assert ServerSettings.read(dumps(asdict(server))) == server
    arguments = server.mosec_arguments()
    assert arguments[arguments.index("--timeout") + 1] == "500"


def test_workers_get_neither_the_token_nor_settings_of_mosecs():
    assert settings("m").environment()["OATLITE_ORACLE_TOKEN"] == ""
    inherited = {"PATH": "p", "MOSEC_ADDRESS": "0.0.0.0", "MOSEC_COMPRESSION": "1"}
    assert environment(inherited) == {"PATH": "p", "MOSEC_LOG_LEVEL": "warning"}


def test_one_worker_says_for_all_that_a_chat_template_is_not_used(tmp_path, caplog):
    path = save_model(tmp_path / "chat", reward=True, tokenizer=byte_tokenizer(chat=True))
    for index in (0, 1):
        load(settings(path, index=index))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{path} has a chat template, and reads plain text" in caplog.text


def test_a_function_is_served(tmp_path):
    (tmp_path / "mine.py").write_text("def score(response, reference):\n    return len(response) - len(reference)\n")
    oracle = load(settings(f"{tmp_path / 'mine.py'}:score"))
    request = decode_request(encode_comparison(["p"], ["aa"], ["a"], ["r"]))
    verdicts = decode_verdicts(answers(oracle, [request])[0], 1)
    assert (verdicts.first_scores.tolist(), verdicts.second_scores.tolist()) == ([1.0], [0.0])
    with pytest.raises(OracleError, match="takes a reference"):
        answers(oracle, [decode_request(encode_comparison(["p"], ["aa"], ["a"]))])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def score(response):\n    return 'good'\n", "returned 'good', which is no finite number"),
        ("def score(response, reference):\n    return 1e300\n", "no finite number"),
        ("def score(response):\n    return {}[response]\n", "raised KeyError"),
        ("def score(first, second):\n    return 2.0\n", "a win probability of 2"),
    ],
)
def test_a_function_whose_answer_cannot_be_used_is_refused_at_the_start(tmp_path, body, words):
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(ConfigError, match=words) as error:
        load(settings(f"{tmp_path / 'mine.py'}:score"))
    assert "return None where it cannot say" in error.value.fix


def test_who_gives_no_references_to_a_function_that_takes_them_is_refused_at_the_gate(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def prefer(first, second, reference):\n    return first == reference\n")
    (tmp_path / f"{READY}0").write_text(traits(load(settings(f"{tmp_path / 'mine.py'}:prefer"))))
    monkeypatch.setenv(NOTES, str(tmp_path))
    gate = Gate()
    with_references = encode_comparison(["p"], ["aa"], ["a"], ["a"])
    assert gate.deserialize(with_references) == with_references
    with pytest.raises(ValidationError, match="batch_reference"):
        gate.deserialize(encode_comparison(["p"], ["aa"], ["a"]))
    with pytest.raises(ValidationError, match="only compares"):
        gate.deserialize(reward_body(["p"], ["a"]))


def test_who_has_the_wrong_token_is_told_where_it_goes(tmp_path, monkeypatch):
    monkeypatch.setenv(NOTES, str(tmp_path))
    monkeypatch.setenv("OATLITE_ORACLE_TOKEN", "right")
    with pytest.raises(ClientError, match="wrong; set OATLITE_ORACLE_TOKEN"):
        Gate().deserialize(encode_comparison(["p"], ["aa"], ["a"], token="wrong"))


def test_infinite_scores_are_an_error_and_missing_ones_nan(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from oatlite.oracles import RewardOracle\n"
        "class Scores(RewardOracle):\n"
        "    def score(self, prompts, responses, references=None):\n"
        "        return [{'huge': float('inf'), 'odd': float('nan')}.get(text, 1.0) for text in responses]\n"
    )
    oracle = load(settings(f"{tmp_path / 'mine.py'}:Scores"))
    [answer] = answers(oracle, [decode_request(reward_body(["p", "p"], ["odd", "good"]))])
    assert np.array_equal(read_scores(answer), [np.nan, 1.0], equal_nan=True)
    with pytest.raises(OracleError, match="infinite scores"):
        answers(oracle, [decode_request(reward_body(["p", "p"], ["huge", "good"]))])


def test_pairrm_is_served_and_not_split(tmp_path):
    path, logit = save_pairrm(tmp_path / "pairrm")
    oracle = load(settings(path, max_tokens=256))
    request = decode_request(encode_comparison(["p"], ["one"], ["other"]))
    (win,) = decode_verdicts(answers(oracle, [request])[0], 1).first_win
    both = (logit("p", "one", "other") - logit("p", "other", "one")) / 2
    assert win == pytest.approx(1 / (1 + 2.718281828**-both), abs=1e-5)
    with pytest.raises(ConfigError, match="leave --devices-per-worker out"):
        load(settings(path, device="auto"))


def test_a_model_without_a_head_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no classification head"):
        load(settings(save_model(tmp_path / "policy")))
