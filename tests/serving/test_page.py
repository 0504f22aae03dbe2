"""The page in a real browser, with the real server: chat, explanations, judging, and safety against hostile text.

`DPO_SCREENSHOTS=folder` keeps the screenshots. To make the one of the README, of the latest run:
`DPO_PICTURE=docs/images/page.png pytest tests/serving/test_page.py -k picture`.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo.data.dialogue import DialoguePair, parse_pair
from tests.support.browser import BETA, CHROMIUM, HELD_OUT, QUIET, RESULTS, STEPS, canned, make_run, post, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium")
expect = playwright.expect
expect.set_options(timeout=20_000)  # machines that run tests are busy

SIDES = ("policy", "reference")
QUESTION = "What is the capital of Italy?"
HOSTILE_TEXTS = (
    "<script>window.hurt=1</script>",
    "<img src=x onerror=window.hurt=1>",
    "<svg onload=window.hurt=1><iframe srcdoc='<script>parent.hurt=1</script>'>",
    '"><a href="javascript:window.hurt=1">x</a>{{7*7}}${window.hurt=1}</textarea></title>',
    "safe\u202egnp.exe\u202c \u2066isolated\u2069 \u200bzero \ufeffmark\u0007",
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving("--model", str(make_run(tmp_path_factory.mktemp("italy")))) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


class Watched:
    """A page, with a record of its requests and of everything that it complained about."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.address = address
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
        self.context.set_default_timeout(30_000)
        self.page = self.context.new_page()
        self.requests: list[Any] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("console", lambda entry: entry.type in ("error", "warning") and self.problems.append(entry.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.goto(address)
        self.page.wait_for_selector("#examples button")

    def close(self, expected: str = "^$") -> None:
        """Check that no request went elsewhere, no injected script ran, and all complaints were expected."""
        assert {request.url.split("/")[2] for request in self.requests if "://" in request.url[:8]} == {
            self.address.removeprefix("http://")
        }
        assert self.page.evaluate("window.hurt") is None
        assert [problem for problem in self.problems if not re.search(expected, problem)] == []
        self.context.close()

    def say(self, answers: dict[str, str]) -> None:
        """From now on, have the models give these answers."""

        def reply(route: Any) -> None:
            stream = canned(*re.findall(r"(?s).{1,4}", answers[json.loads(route.request.post_data)["model"]]))
            route.fulfill(body=stream, content_type="text/event-stream")

        self.page.unroute_all()
        self.page.route("**/v1/chat/completions", reply)

    def set(self, **values: object) -> None:
        self.page.locator("#settings").evaluate("details => details.open = true")
        for name, value in values.items():
            self.page.fill(f"#{name}", str(value))
            self.page.press(f"#{name}", "Tab")

    def ask(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")
        self.finish()

    def finish(self) -> None:
        expect(self.page.locator("#send")).to_be_visible(timeout=30_000)

    def answer(self, side: str, turn: int = -1) -> Any:
        return self.page.locator(f"#turns > li:nth-{'last-' * (turn < 0)}child({abs(turn)}) .answer.{side}")

    def said(self, side: str, turn: int = -1) -> str:
        return str(self.answer(side, turn).locator(".text").inner_text())

    def sent(self, path: str) -> list[dict[str, Any]]:
        return [json.loads(r.post_data) for r in self.requests if r.url == self.address + path and r.post_data]

    def show(self, view: str) -> None:
        self.page.click(f"#tab-{view}")
        expect(self.page.locator(f"#{view}")).to_be_visible()


@pytest.fixture
def watched(browser: Any, address: str) -> Iterator[Watched]:
    watched = Watched(browser, address, permissions=["clipboard-read", "clipboard-write"])
    yield watched
    watched.close()


@pytest.fixture
def troubled(browser: Any, address: str) -> Iterator[Watched]:
    """The same for tests in which requests fail, which the browser logs."""
    watched = Watched(browser, address)
    yield watched
    watched.close(expected="Failed to load resource")


def test_both_models_stream_the_answers_that_a_program_gets(watched: Watched, address: str) -> None:
    page = watched.page
    watched.set(temperature=0, max_tokens=24)
    page.evaluate(
        """() => { window.grown = {policy: 0, reference: 0};
        new MutationObserver((all) => { for (const one of all) {
          const text = one.target.parentElement?.closest?.(".text") ?? one.target.closest?.(".text");
          const side = text?.closest(".answer").classList.contains("policy") ? "policy" : "reference";
          if (text && one.addedNodes.length) window.grown[side] += 1; } }
        ).observe(document.getElementById("turns"), {childList: true, subtree: true}); }"""
    )
    watched.ask(QUESTION)
    for side in SIDES:
        body = {"model": side, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}
        reply = post(address, "/v1/chat/completions", body)
        assert watched.said(side) == reply["choices"][0]["message"]["content"].strip()
        expect(watched.answer(side).locator(".facts")).to_contain_text(f"{reply['usage']['completion_tokens']} tokens")
        assert page.evaluate(f"window.grown.{side}") > 3  # piece by piece
    assert page.locator("#turns > li").count() == 1


def test_stop_ends_both_and_the_next_question_is_answered(watched: Watched, address: str) -> None:
    page = watched.page
    drawn = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 2, "top_p": 1, "max_tokens": 200}

    def length(side: str, seed: int) -> int:
        reply = post(address, "/v1/chat/completions", drawn | {"model": side, "seed": seed})
        return int(reply["usage"]["completion_tokens"])

    seed = next(seed for seed in range(100) if min(length(side, seed) for side in SIDES) >= 20)
    watched.set(temperature=2, top_p=1, max_tokens=200, seed=seed)
    page.evaluate(
        """() => new MutationObserver((_, observer) => {
        if (![...document.querySelectorAll(".answer .text")].every((text) => text.textContent)) return;
        observer.disconnect();
        document.getElementById("stop").click(); }
        ).observe(document.getElementById("turns"), {childList: true, subtree: true})"""
    )
    watched.ask(QUESTION)
    for side in SIDES:
        expect(watched.answer(side).locator(".facts")).to_have_text("stopped")
        assert watched.said(side)
    assert not page.locator("[aria-busy=true]").count()

    page.route("**/v1/chat/completions", lambda route: None)  # a server that keeps silent
    page.fill("#prompt", "Hello")
    page.press("#prompt", "Enter")
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(watched.answer("policy").locator(".problem")).to_have_text("Stopped before the first word.")
    page.unroute_all(behavior="ignoreErrors")
    watched.set(temperature=0, max_tokens=8)
    watched.ask("And of France?")
    assert watched.said("policy")
    asked = watched.sent("/v1/chat/completions")[-1]["messages"]
    assert [message["content"] for message in asked[::2]] == [
        QUESTION,
        "And of France?",
    ]  # what got no answer is left out


def test_the_conversation_goes_on_with_the_better_answer_and_is_exported(watched: Watched, tmp_path: Path) -> None:
    page = watched.page
    first = {"policy": "It is Rome.", "reference": "I do not\n\nknow."}
    watched.say(first)
    watched.set(temperature=1, max_tokens=24, seed=3)
    watched.ask(QUESTION)
    watched.answer("reference").locator(".better").click()
    expect(watched.answer("reference").locator(".better")).to_have_attribute("aria-pressed", "true")
    watched.say({"policy": "Paris.", "reference": "Who knows?"})
    watched.ask("And of France?")
    messages = [("user", QUESTION), ("assistant", first["reference"]), ("user", "And of France?")]
    for sent in watched.sent("/v1/chat/completions")[-2:]:
        assert [(m["role"], m["content"]) for m in sent["messages"]] == messages
        assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (1, 24, 3)

    watched.answer("policy").locator(".better").click()
    watched.say({"policy": "The same.", "reference": "The same."})
    watched.ask("And of Spain?")
    expect(watched.answer("policy").locator("footer")).to_contain_text("Both answers are the same.")
    expect(watched.answer("policy").locator(".better")).to_be_hidden()
    page.reload()  # everything is kept in the browser
    expect(page.locator("#turns > li")).to_have_count(3)
    assert watched.said("reference", 1) == first["reference"]
    page.click("text=Export")
    with page.expect_download() as download:
        page.click("#export-pairs")
    file = tmp_path / "train.jsonl"
    download.value.save_as(file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert all(isinstance(parse_pair(**row), DialoguePair) for row in rows)
    opening = f"\n\nHuman: {QUESTION}\n\nAssistant: "
    second = f"{opening}{first['reference']}\n\nHuman: And of France?\n\nAssistant: "
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        (opening + first["reference"], opening + first["policy"]),
        (f"{second}Paris.", f"{second}Who knows?"),
    ]
    page.click("text=Export")
    with page.expect_download() as download:
        page.click("#export-conversation")
    download.value.save_as(file)
    turns = json.loads(file.read_text())["turns"]
    assert turns[0]["continued_with"] == "reference"
    assert [(m["role"], m["content"]) for m in turns[1]["messages"]] == messages


def test_edit_ask_again_copy_clear_and_undo(watched: Watched) -> None:
    page = watched.page
    watched.set(temperature=0, max_tokens=12)
    watched.ask(QUESTION)
    watched.ask("And of France?")
    page.locator("#turns > li:first-child").get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("What comes after Monday?")
    page.get_by_label("Edit the message").press("Enter")
    watched.finish()
    expect(page.locator("#turns > li")).to_have_count(1)
    expect(page.locator(".said")).to_have_text("What comes after Monday?")
    before, asked = watched.said("policy"), len(watched.sent("/v1/chat/completions"))
    page.get_by_role("button", name="Ask again").click()
    watched.finish()
    assert watched.said("policy") == before  # temperature 0
    assert len(watched.sent("/v1/chat/completions")) == asked + 2
    watched.answer("policy").get_by_role("button", name="Copy").click()
    expect(page.locator("#notice")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == before
    page.click("#clear")
    expect(page.locator("#turns > li")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#turns > li")).to_have_count(1)
    page.click("#new")
    expect(page.locator("#turns > li")).to_have_count(0)
    page.click("#history-summary")
    page.locator("#history button").click()
    expect(page.locator(".said")).to_have_text("What comes after Monday?")


def test_a_damaged_history_is_ignored(watched: Watched) -> None:
    page = watched.page
    page.evaluate(
        """() => { localStorage["dpo.conversations"] = '{"conversations": [1, {"id": "x", "turns": [{}]}]}';
        localStorage["dpo.conversations.settings"] = '{"temperature": "hot", "top_p": 0.5, "tools": 1}'; }"""
    )
    page.reload()
    watched.say({"policy": "Yes.", "reference": "No."})
    watched.ask("Well?")
    assert watched.said("policy") == "Yes."
    sent = watched.sent("/v1/chat/completions")[-1]
    assert (sent["temperature"], sent["top_p"]) == (0.7, 0.5)
    assert "tools" not in sent
    page.evaluate("localStorage['dpo.conversations'] = '{'")
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()


def test_two_tabs_keep_each_others_conversations(watched: Watched) -> None:
    watched.set(temperature=0, max_tokens=8)
    other = watched.context.new_page()
    other.goto(watched.address)
    watched.ask(QUESTION)
    other.fill("#prompt", "What comes after Monday?")
    other.press("#prompt", "Enter")
    expect(other.locator("button.reward")).to_have_count(2)
    watched.ask("And of France?")
    watched.page.reload()
    expect(watched.page.locator("#history-summary")).to_have_text("Conversations (2)")
    other.reload()
    expect(other.locator("#history-summary")).to_have_text("Conversations (2)")


def numbers(tokens: Any) -> list[tuple[float, float]]:
    pairs = tokens.evaluate_all("all => all.map((one) => [+one.dataset.policy, +one.dataset.reference])")
    return [tuple(one) for one in pairs]


def shown(value: float, decimals: int = 2) -> str:
    """A number as the page writes it, derived here: sign, true minus, fixed decimals."""
    digits = f"{abs(value):.{decimals}f}"
    return ("" if float(digits) == 0 else "\N{MINUS SIGN}" if value < 0 else "+") + digits


def test_the_colours_follow_the_scores(watched: Watched, address: str) -> None:
    page = watched.page
    watched.set(temperature=0, max_tokens=24)
    watched.ask(QUESTION)
    answers = [watched.said(side) for side in SIDES]
    body = {"messages": [{"role": "user", "content": QUESTION}], "answers": answers, "tokens": True}
    score = post(address, "/v1/score", body)
    for side, scored in zip(SIDES, score["answers"], strict=True):
        expect(watched.answer(side).locator("button.reward")).to_contain_text(shown(scored["reward"]))
    watched.answer("policy").locator("button.reward").click()
    expect(page.locator("#why")).to_be_visible()
    for side, scored in zip(SIDES, score["answers"], strict=True):
        tokens = page.locator(f"#why .answer.{side} .tokens .token")
        expect(tokens).to_have_count(scored["length"])
        for mine, theirs in zip(numbers(tokens), scored["tokens"], strict=True):
            assert mine == pytest.approx((theirs["policy"], theirs["reference"]), abs=1e-4)
        ratios = [token["policy"] - token["reference"] for token in scored["tokens"]]
        assert math.fsum(ratios) * score["beta"] == pytest.approx(scored["reward"], abs=1e-5)
        texts = tokens.evaluate_all("all => all.map((one) => one.innerText)")
        largest = max(range(len(ratios)), key=lambda i: abs(ratios[i]))
        assert f"log-ratio {shown(ratios[largest])}" in texts[largest]  # for screen readers
        assert ("up" if ratios[largest] > 0 else "down") in tokens.nth(largest).get_attribute("class")
        tokens.nth(largest).hover()
        tip = page.locator("#tip").inner_text()
        assert all(shown(scored["tokens"][largest][name], 3) in tip for name in SIDES)


def test_a_cut_answer_shows_no_end_that_was_never_said(watched: Watched) -> None:
    watched.set(temperature=0, max_tokens=4)
    watched.ask(QUESTION)
    for side in SIDES:
        expect(watched.answer(side)).to_contain_text("cut at 4 tokens")
    watched.answer("policy").locator("button.reward").click()
    for side in SIDES:
        tokens = watched.page.locator(f"#why .answer.{side} .tokens .token")
        expect(tokens).to_have_count(4)
        assert "end" not in "".join(tokens.evaluate_all("all => all.map((one) => one.firstChild.textContent)"))


def test_a_held_out_pair_and_a_typed_one_are_judged(watched: Watched, address: str) -> None:
    page = watched.page
    watched.show("judge")
    page.select_option("#held-out", "1")
    compared = post(address, "/v1/compare", {"pairs": [dict(HELD_OUT[1])], "tokens": True})["pairs"][0]
    winner, sure = ("A", compared["probability"]) if compared["margin"] > 0 else ("B", 1 - compared["probability"])
    expect(page.locator(".verdict .big")).to_have_text(
        f"The policy prefers answer {winner}, {100 * sure:.1f} % sure", timeout=20_000
    )
    expect(page.locator(".verdict")).to_contain_text("agrees" if winner == "A" else "disagrees")
    for place, name in enumerate(("chosen", "rejected")):
        answer = page.locator("#verdict .answer").nth(place)
        expect(answer.locator(".reward strong")).to_have_text(shown(compared[name]["reward"]))
        expected = [(token["policy"], token["reference"]) for token in compared[name]["tokens"]]
        for mine, theirs in zip(numbers(answer.locator(".tokens .token")), expected, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
    assert watched.sent("/v1/compare")[-1]["pairs"][0]["prompt"] == HELD_OUT[1]["prompt"]

    page.click("#swap")
    expect(page.locator(".verdict .big")).to_contain_text(f"answer {'AB'[winner == 'A']}")
    page.click("#judge-clear")
    page.fill("#judge-prompt", "Human: Hi\n\nAssistant: Hello.\n\nHuman: Bye")
    page.fill("#answer-a", "Good-bye.")
    page.fill("#answer-b", "See you.")
    page.press("#answer-b", "Control+Enter")
    expect(page.locator(".verdict")).to_be_visible()
    said = watched.sent("/v1/compare")[-1]["pairs"][0]["messages"]
    assert [m["role"] for m in said] == ["user", "assistant", "user"]
    assert [m["content"] for m in said] == ["Hi", "Hello.", "Bye"]
    page.fill("#answer-b", "Good-bye.")
    page.click("#judge-go")
    expect(page.locator("#verdict")).to_contain_text("Both answers are the same")


def test_the_run_is_shown(watched: Watched) -> None:
    page = watched.page
    watched.show("run")
    table = page.locator("#run table").first
    assert [text.split("\t") for text in table.inner_text().splitlines()] == [list(row) for row in RESULTS]
    figure = page.locator("figure", has_text="Loss").first
    assert figure.locator("svg path").count() > 2
    figure.locator(".plot").focus()
    page.keyboard.press("End")
    last = f"training {STEPS[2]['train/loss']:.2f} · validation {STEPS[3]['val/loss']:.2f}"
    expect(figure.locator(".readout")).to_have_text(f"step 3: {last}")
    expect(page.locator("#run")).to_contain_text("val/rewards/margins")
    page.get_by_text("lines of YAML").click()
    expect(page.locator("#run pre")).to_contain_text(f"beta: {BETA}")


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=["script", "image", "frame", "attribute", "directions"])
def test_text_is_never_taken_for_markup(watched: Watched, text: str) -> None:
    page = watched.page
    watched.say({"policy": text, "reference": text})
    watched.ask(text)
    for _ in range(2):  # as it comes, and as it is kept
        for node in (page.locator(".said"), watched.answer("policy").locator(".text")):
            shown = re.sub(r"[\u200b\u202c\u202e\u2066\u2069\ufeff\a]", lambda m: f"U+{ord(m[0]):04X}", text)
            expect(node).to_have_text(shown)
            assert node.evaluate("all => [...all.querySelectorAll('*')].every(one => one.matches('.hidden-character'))")
        page.reload()
        expect(page.locator(".said")).to_be_visible()
    watched.show("why")
    expect(page.locator("#why .answer.policy .tokens")).to_be_visible()
    watched.show("judge")
    for field, value in {"#judge-prompt": text, "#answer-a": text, "#answer-b": f"No {text}"}.items():
        page.fill(field, value)
    if "\u202e" in text:  # a field orders its text as the browser does, so it is said what is in it
        expect(page.locator("#judge-prompt + p")).to_contain_text("U+202E, U+202C")
    page.click("#judge-go")
    expect(page.locator(".verdict")).to_be_visible()
    page.locator("#verdict summary").first.click()
    unseen = r"[\u200b\u202c\u202e\u2066\u2069\ufeff\a]"
    assert not re.search(unseen, page.locator("#verdict").inner_text())
    assert page.locator("#why, #verdict, #turns").locator("script, img, iframe, a, svg").count() == 0


def test_injected_markup_runs_and_fetches_nothing(browser: Any, address: str) -> None:
    watched = Watched(browser, address)
    watched.page.evaluate(
        """() => {
        const script = document.createElement("script");
        script.textContent = "window.hurt = 1";
        document.body.append(script);
        const box = document.createElement("div");
        box.innerHTML = "<img src=/x onerror='window.hurt=1'><img src=https://example.invalid/y><p style='color:red'>";
        document.body.append(box); }"""
    )
    watched.page.wait_for_timeout(300)
    said = "\n".join(watched.problems)
    assert all(word in said for word in ("inline script", "inline event handler", "inline style", "example.invalid"))
    [blocked] = [request for request in watched.requests if "example.invalid" in request.url]
    assert blocked.failure == "csp"
    watched.requests.remove(blocked)
    watched.close(expected="Content Security Policy|Failed to load")


def test_the_page_works_by_keyboard_alone(watched: Watched) -> None:
    page = watched.page
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#tab-chat")).to_be_focused()
    watched.set(temperature=0, max_tokens=12)
    page.locator("#prompt").focus()
    page.keyboard.type("What comes")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("after Monday?")
    page.keyboard.press("Enter")
    watched.finish()
    expect(page.locator(".said")).to_have_text("What comes\nafter Monday?")
    page.locator("#tab-chat").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-why")).to_be_focused()
    expect(page.locator("#why")).to_be_visible()
    expect(page.locator("#why .tokens .token").first).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.locator("#why .tokens .token").first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#why .tokens .token").nth(1)).to_be_focused()
    expect(page.locator("#tip")).to_contain_text("log-ratio")
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_errors_are_shown_in_plain_words(troubled: Watched) -> None:
    page = troubled.page
    problem = page.locator(".answer.policy .problem")

    def meet(**reply: Any) -> None:
        page.unroute_all()
        page.route("**/v1/chat/completions", lambda route: route.fulfill(**reply))
        troubled.ask("Hello")
        troubled.finish()  # both sides: a late answer of one would be news from a server thought silent

    meet(status=429, headers={"Retry-After": "7"}, json={"error": {"message": "full"}})
    expect(problem.last).to_have_text("The server is busy. Try again in 7 seconds.")
    meet(status=500, body="<h1>no</h1>")
    expect(problem.last).to_have_text("The server reported an error: status 500")
    meet(body=canned("half an ans", done=False), content_type="text/event-stream")
    expect(problem.last).to_have_text("The answer was cut off: the connection closed.")
    page.unroute_all()
    page.route("**/v1/**", lambda route: route.abort())
    troubled.ask("Hello")
    expect(problem.last).to_have_text("The server is not responding. Is it still running?")
    troubled.finish()
    page.get_by_role("button", name="Try again").last.click()  # by now nothing asked before is still on its way
    expect(page.locator("#offline")).to_be_visible()
    page.unroute_all()
    page.get_by_role("button", name="Try again").last.click()
    troubled.finish()
    expect(page.locator("#offline")).to_be_hidden()
    assert troubled.said("reference")
    troubled.set(max_tokens=100_000)
    troubled.ask("Hello")
    expect(problem.last).to_contain_text("got 100000")


def test_a_note_on_the_reference_is_shown_in_every_view(watched: Watched, address: str) -> None:
    page = watched.page
    expect(page.locator("#note")).to_be_hidden()  # it was trained against the reference that is shown
    note = "The policy was trained without a reference; <b>what it was</b> stands in for one."
    page.route("**/v1/run", lambda route: route.fulfill(json=route.fetch().json() | {"note": note}))
    page.reload()
    for view in ("chat", "why", "judge", "run"):
        watched.show(view)
        expect(page.locator("#note")).to_have_text(note)


def test_the_key_is_asked_for_once(troubled: Watched, address: str) -> None:
    page = troubled.page

    def door(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "no"}})

    page.route("**/v1/**", door)
    page.reload()
    page.fill("#key-value", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-wrong")).to_be_visible()
    page.fill("#key-value", "right")
    page.keyboard.press("Enter")
    expect(page.locator("#run-name")).to_have_text(re.compile("italy"))
    troubled.set(temperature=0, max_tokens=8)
    troubled.ask(QUESTION)
    assert troubled.said("policy")
    assert not page.locator("#key").is_visible()
    kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)].map(String)")
    assert "right" in kept[0]
    assert "right" not in kept[1]


# Contrast of every text with what lies below it (WCAG 2, 1.4.3): 4.5, for large text 3; what is disabled is exempt.
CONTRAST = """() => {
  const brush = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const paint = (colours) => { brush.clearRect(0, 0, 1, 1);
    for (const colour of colours) { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1); }
    return [...brush.getImageData(0, 0, 1, 1).data]; };
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const low = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.closest(":disabled, .sr-only, .skip, svg, option, noscript")) continue;
    const style = getComputedStyle(node), below = [];
    for (let up = node; up; up = up.parentElement) below.unshift(getComputedStyle(up).backgroundColor);
    const [a, b] = [light(paint(below)), light(paint([...below, style.color]))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05), size = parseFloat(style.fontSize);
    if (ratio < (size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5))
      low.push(`${node.tagName}.${node.className} ${ratio.toFixed(2)} ${node.textContent.slice(0, 30)}`);
  }
  return low;
}"""
NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, summary")]
  .filter((node) => node.checkVisibility() && !(node.labels?.length || node.ariaLabel || node.textContent.trim()))
  .map((node) => node.outerHTML)"""


@pytest.mark.parametrize(
    ("name", "scheme", "width", "height"),
    [("light", "light", 1280, 860), ("dark", "dark", 1280, 860), ("phone", "light", 360, 740)],
)
def test_layout(browser: Any, address: str, tmp_path: Path, name: str, scheme: str, width: int, height: int) -> None:
    folder = Path(os.environ.get("DPO_SCREENSHOTS", tmp_path))
    size = {"width": width, "height": height}
    watched = Watched(browser, address, color_scheme=scheme, viewport=size, has_touch=name == "phone")
    page = watched.page
    watched.set(temperature=0, max_tokens=24)
    watched.ask(QUESTION)
    expect(page.locator("button.reward").last).to_be_visible()
    page.locator("#settings").evaluate("details => details.open = false")
    for view in ("chat", "why", "judge", "run"):
        watched.show(view)
        if view == "judge":
            page.select_option("#held-out", "1")
            expect(page.locator(".verdict")).to_be_visible()
        if view == "why":
            expect(page.locator("#why .token").last).to_be_visible()
            page.locator("#why .token").nth(3).focus()
        page.wait_for_timeout(200)  # colours fade in
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CONTRAST) == []
        assert page.evaluate(NAMELESS) == []
        picture = page.screenshot(path=folder / f"{name}-{view}.png")
        assert len(picture) > 10_000
    watched.close()


def test_picture_for_the_readme(browser: Any) -> None:
    place = os.environ.get("DPO_PICTURE")
    if place is None:
        pytest.skip("DPO_PICTURE does not say where the picture goes")
    with serving() as address:  # runs/latest
        watched = Watched(browser, address, viewport={"width": 1120, "height": 600}, device_scale_factor=2)
        watched.set(temperature=0)
        watched.page.locator("#examples button").first.click()
        watched.finish()
        watched.show("why")
        expect(watched.page.locator("#why .tokens .token").last).to_be_visible()
        watched.page.screenshot(path=place)
        watched.close()
