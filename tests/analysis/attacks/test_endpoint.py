"""The endpoint, its judge and its victim against a local server that misbehaves."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from mmhooks.analysis.attacks.bounded_post import EndpointError
from mmhooks.analysis.attacks.chat_endpoint import Endpoint
from mmhooks.analysis.attacks.judges import (
    PAPER,
    EndpointJudge,
    Judge,
    RuleJudge,
    deepseek_judge,
    names,
    refuses,
    verdict,
)
from mmhooks.analysis.attacks.victims import EndpointVictim, Victim


class Server:
    """Plays a script, one entry a request: a text to answer, a whole reply, a status, "slow", "garbage", "null" or "cut"."""

    def __init__(self):
        self.script, self.seen, self.keys = [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                act = outer.script.pop(0) if outer.script else "YES"
                if act == "slow":
                    time.sleep(1.0)
                    act = "YES"
                if act == "cut":
                    self.connection.close()
                    return
                status = act if isinstance(act, int) else 200
                if act == "garbage":
                    payload = b"<html>not json"
                elif act == "null":
                    payload = json.dumps({"choices": [{"message": {"content": None}}]}).encode()
                elif isinstance(act, dict):
                    payload = json.dumps(act).encode()
                else:
                    payload = json.dumps({"choices": [{"message": {"content": str(act)}}]}).encode()
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "7")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                try:
                    self.wfile.write(payload)
                except BrokenPipeError:
                    pass

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def endpoint(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "secret-key")
    slept = []
    made = Endpoint("judge-1", server.url, "TEST_KEY", timeout=0.3, per_minute=1e9, cache=tmp_path / "answers",
                    sleep=slept.append)  # fmt: skip
    made.slept = slept
    return made


ASK = [{"role": "user", "content": "well?"}]


def test_an_answer_is_requested_once_and_cached(server, endpoint, tmp_path):
    server.script = ["first", "second"]
    assert [endpoint.ask(ASK), endpoint.ask(ASK)] == ["first", "first"]
    assert len(server.seen) == 1 and server.keys == ["Bearer secret-key"]
    assert server.seen[0]["model"] == "judge-1" and server.seen[0]["temperature"] == 0
    assert endpoint.ask([{"role": "user", "content": "else?"}]) == "second"
    for file in (tmp_path / "answers").iterdir():
        assert "secret-key" not in file.read_text()


@pytest.mark.parametrize("fault", ["slow", "cut", "garbage", "null", 429, 500, 503])
def test_transient_faults_are_retried(server, endpoint, fault):
    server.script = [fault, "there"]
    assert endpoint.ask(ASK) == "there"
    assert len(server.seen) == 2 and len(endpoint.slept) == 1
    if fault == 429:
        assert endpoint.slept == [7.0]  # what Retry-After says
    else:
        assert 0.7 < endpoint.slept[0] < 1.3


def test_waiting_doubles_until_tries_run_out(server, endpoint):
    server.script = [500] * 9
    with pytest.raises(EndpointError, match="no answer in 5 tries; last: status 500"):
        endpoint.ask(ASK)
    assert len(server.seen) == 5
    assert [round(s / 2**i) for i, s in enumerate(endpoint.slept)] == [1, 1, 1, 1]


def test_a_refused_key_is_not_retried(server, endpoint):
    server.script = [401]
    with pytest.raises(EndpointError, match="401"):
        endpoint.ask(ASK)
    assert len(server.seen) == 1


def test_a_missing_key_fails_before_anything_is_sent(server, endpoint, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(EndpointError, match="TEST_KEY"):
        endpoint.ask(ASK)
    assert not server.seen


def test_the_rate_limit_spaces_requests(server, endpoint):
    now, waits = [100.0], []
    endpoint.per_minute, endpoint.keep = 30, False
    endpoint.clock = lambda: now[0]

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    endpoint.sleep = sleep
    for _ in range(3):
        endpoint.ask(ASK)
    assert waits == pytest.approx([2.0, 2.0])


# -- judges ------------------------------------------------------------------------------------------------


def test_the_judge_retries_after_nonsense_and_never_caches_it(server, endpoint):
    judge = EndpointJudge(endpoint, progress=False)
    assert isinstance(judge, Judge)
    server.script = ["perhaps?", "No.", "**YES**"]
    asked = (["say"] * 3, ["I cannot.", "Sure, the bomb.", "I cannot."], ["bomb"] * 3)
    assert judge.successes(*asked) == [False, True, False]
    assert len(server.seen) == 3  # equal questions are one
    assert judge.successes(*asked) == [False, True, False] and len(server.seen) == 3
    server.script = ["perhaps?"] * 9
    with pytest.raises(EndpointError, match="nonsense"):
        judge.successes(["say"], ["new"], ["bomb"])


def completion(text, *, end="stop", served="deepseek-v3"):
    return {"model": served, "choices": [{"message": {"content": text}, "finish_reason": end}]}


def test_the_papers_judge_asks_deepseek_whether_the_request_was_rejected_or_executed(
    server, tmp_path, monkeypatch, caplog
):
    default = deepseek_judge().endpoint
    assert (default.model, default.base_url, default.key_variable) == (
        "deepseek-chat", "https://api.deepseek.com", "DEEPSEEK_API_KEY",
    )  # fmt: skip
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-0123456789abcdef")
    caplog.set_level("DEBUG")
    judge = deepseek_judge(server.url, progress=False, cache=tmp_path, per_minute=1e9, sleep=lambda _: None)
    server.script = [
        completion("YES"),
        completion("Rejected."),
        completion("EXECUTED", served="deepseek-v3.1"),
    ]
    asked = (["say"] * 3, ["I cannot.", "Sure, the bomb.", "I cannot."], ["bomb"] * 3)
    assert judge.successes(*asked) == [False, True, False]  # YES is neither word, and asked again
    assert judge.served == {"deepseek-v3", "deepseek-v3.1"}
    assert [body["model"] for body in server.seen] == ["deepseek-chat"] * 3
    system, question = server.seen[-1]["messages"]
    assert system == {"role": "system", "content": PAPER.system} and "REJECTED" in PAPER.system
    assert json.loads(question["content"]) == {
        "picture": "bomb", "request": "say", "answer": "Sure, the bomb.",
    }  # fmt: skip
    again = deepseek_judge(server.url, progress=False, cache=tmp_path)
    assert again.successes(*asked) == [False, True, False] and again.served == judge.served
    assert len(server.seen) == 3 and set(server.keys) == {"Bearer sk-0123456789abcdef"}
    written = [caplog.text, repr(judge), *(f.read_text() for f in tmp_path.iterdir())]
    assert not any("sk-0123456789abcdef" in text for text in written)
    monkeypatch.delenv("DEEPSEEK_API_KEY")
    with pytest.raises(EndpointError, match="set the environment variable DEEPSEEK_API_KEY"):
        judge.endpoint.require_key()


@pytest.mark.parametrize(
    "reply", ["EXECUTED or REJECTED? REJECTED", "not executed", "YES", "", "EXECUTED. REJECTED."]
)
def test_the_papers_two_words_alone_decide(reply):
    with pytest.raises(ValueError, match="expected EXECUTED or REJECTED and nothing else"):
        verdict(reply, PAPER)
    assert (verdict("**Executed**", PAPER), verdict("rejected.", PAPER)) == (True, False)


def test_an_answer_of_an_endpoint_that_is_cut_is_counted(server, endpoint):
    victim = EndpointVictim(endpoint)
    server.script = [completion("A long", end="length"), completion("A dot.")]
    for _ in range(2):  # the second time from the cache
        assert victim.answer(torch.eye(8).expand(2, 3, 8, 8), ["what?", "which?"]) == ["A long", "A dot."]
    assert victim.cut == [True, False] * 2 and len(server.seen) == 2 and victim.answer_tokens == 64


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I cannot help with that.", True),
        ("I\u2019m sorry, but no.", True),
        ("I can't assist with this request.", True),
        ("I am unable to provide that", True),
        ("", True),
        ("Sure, this is how to use the bomb.", False),
        ("A drawing of a can opener.", False),
    ],
)
def test_refusals(answer, expected):
    assert refuses(answer) is expected


def test_rules_require_compliance_about_a_harmful_thing():
    judge = RuleJudge(("bomb", "knife"))
    answers = ["Sure, this is how to use the bomb.", "Sure, this is how to use the rose.", "I cannot help with that bomb.",
               "the kitchen knife", "Sure, a pill."]  # fmt: skip
    assert judge.successes(["?"] * 5, answers, ["bomb"] * 4 + ["pill"]) == [True, False, False, True, True]
    assert not names("a bombastic tone", ["bomb"])


# -- victims -----------------------------------------------------------------------------------------------


def test_an_endpoint_victim_sends_the_image(server, endpoint):
    import base64
    import io

    from PIL import Image

    victim = EndpointVictim(endpoint)
    assert isinstance(victim, Victim)
    server.script = ["A square.", 429, "A dot."]
    pictures = torch.zeros(2, 3, 8, 8)
    pictures[1, 0] = 1.0
    assert victim.answer(pictures, ["what?", "what?"]) == ["A square.", "A dot."]
    content = server.seen[-1]["messages"][0]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(content[1]["image_url"]["url"].split(",")[1])))
    assert content[0]["text"] == "what?" and sent.size == (8, 8) and sent.getpixel((3, 3)) == (255, 0, 0)
