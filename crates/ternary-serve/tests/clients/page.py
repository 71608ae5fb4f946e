"""Drives the chat page in Chromium. With `pip install selenium`, chromium and chromedriver:

    duck serve duck=crates/duck/duck.gguf other=MODEL --port 8080 [--api-key KEY]
    python page.py http://127.0.0.1:8080 [--key KEY] [--duck PROGRAM] [--screenshots FOLDER] [--only CHECK]

With the program `duck`, servers of its own are ended and started again.
"""

import argparse
import contextlib
import http.client
import http.server
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--key")
parser.add_argument("--duck", metavar="PROGRAM")
parser.add_argument("--screenshots", metavar="FOLDER")
parser.add_argument("--only", metavar="CHECK")
arguments = parser.parse_args()
BASE, KEY = arguments.url.rstrip("/"), arguments.key
PATIENCE = 60  # seconds, for a slow machine
QUESTION = "Who are you?"
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "min_p": 0.05}  # the page's defaults
WIDE, NARROW = (1280, 800), (390, 700)
HERE = Path(__file__).parent
QUESTIONS = (HERE / "questions.txt").read_text().splitlines()


# The server, without the page


def ask(path, body=None):
    request = urllib.request.Request(BASE + path, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if KEY:
        request.add_header("Authorization", f"Bearer {KEY}")
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return response.read().decode()


def answer(model, seed):
    """The texts that the events of an answer hold, and how many tokens they are."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "seed": seed, "stream": True,
            "stream_options": {"include_usage": True}}
    text = ask("/v1/chat/completions", body | SAMPLING)
    events = [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]
    texts = [choice["delta"].get("content") for event in events for choice in event["choices"]]
    return [text for text in texts if text], events[-1]["usage"]["completion_tokens"]


def prompt_tokens(model):
    start = f'duck_prompt_tokens_total{{model="{model}"}} '
    return next(float(line[len(start):]) for line in ask("/metrics").splitlines() if line.startswith(start))


class Gate(http.server.ThreadingHTTPServer):
    """Stands between the page and the server and lets the texts of answers through one by one, as a slow model would
    send them, or edited."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Relay)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.paths = []  # of all requests
        self.change = threading.Condition()
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        self.allowed = float("inf")  # texts that may pass
        self.left = 0  # answers that the page did not wait for
        self.broken = False  # answers end in the middle
        self.edit = lambda event: event
        self.texts_only = set()  # models that the page is told to be without a chat template
        self.paths.clear()

    def hold(self):
        self.allowed = 0

    def let(self, count=float("inf")):
        with self.change:
            self.allowed += count
            self.change.notify_all()

    def passes(self, client):
        """Waits for leave to let a text through; false if the answer goes no further."""
        with self.change:
            while self.allowed < 1:
                if self.broken:
                    return False
                if select.select([client], [], [], 0)[0] and not client.recv(1, socket.MSG_PEEK):
                    self.left += 1
                    return False
                self.change.wait(0.02)
            self.allowed -= 1
        return True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a page may leave at any time
            super().handle_error(request, client_address)


class Relay(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        gate, server = self.server, urlparse(BASE)
        gate.paths.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection(server.hostname, server.port, timeout=PATIENCE)
        with contextlib.closing(upstream):
            upstream.request(self.command, self.path, body, dict(self.headers.items()))
            response = upstream.getresponse()
            self.send_response_only(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if "event-stream" not in response.headers["Content-Type"]:
                body = response.read()
                if self.path == "/v1/models" and gate.texts_only:
                    list = json.loads(body)
                    for model in list["data"]:
                        model["chat_template"] &= model["id"] not in gate.texts_only
                    body = json.dumps(list).encode()
                self.chunk(body)
            else:
                for line in response:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        choice = (event["choices"] or [{}])[0]
                        if choice.get("text") or choice.get("delta", {}).get("content"):
                            line = b"data: " + json.dumps(gate.edit(event), ensure_ascii=False).encode() + b"\n"
                            # Events need not come whole.
                            self.chunk(line[:20])
                            if not gate.passes(self.connection):
                                return
                            line = line[20:]
                    self.chunk(line)
            self.chunk(b"")  # the end

    do_POST = do_GET

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, *_):
        pass


# The browser


def start():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or ""
    # Without a sandbox, for containers and root; it sees no page but ours. With a mouse, which it has not on a server.
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "blink-settings=primaryPointerType=4,availablePointerTypes=4", f"user-data-dir={folder}",
                 "window-size=%d,%d" % WIDE):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


class Seen:
    """What the browser logged since the page was opened."""

    def __init__(self):
        self.console, self.requests = [], []

    def clear(self):
        self.read()
        self.__init__()

    def read(self):
        self.console += browser.get_log("browser")
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        self.requests += [params["request"] for params in sent]

    def chats(self):
        """The bodies of all requests for an answer."""
        self.read()
        return [json.loads(request["postData"]) for request in self.requests
                if request["url"].endswith("/completions")]

    def check(self, tolerated):
        self.read()
        bad = [entry["message"] for entry in self.console if entry["level"] not in ("DEBUG", "INFO")]
        bad = [message for message in bad if not any(text in message for text in tolerated)]
        assert not bad, f"in the console: {bad}"
        ours = (BASE + "/", gate.url + "/", own + "/", "about:", "data:", "blob:")
        others = [request["url"] for request in self.requests if not request["url"].startswith(ours)]
        assert not others, f"requests to {others}"


def find(selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def state():
    """What the page shows."""
    return SimpleNamespace(**browser.execute_script("""
        const $ = (id) => document.getElementById(id);
        const shown = (id) => $(id).checkVisibility();
        return {
          turns: [...document.querySelectorAll("#log > li")].map((item) => item.querySelector(".text").textContent),
          roles: [...document.querySelectorAll("#log > li")].map((item) => item.classList[0]),
          note: document.querySelector("#log > li:last-child .note")?.textContent ?? "",
          places: [...document.querySelectorAll("#log > li")].map((item) => item.querySelector(".branches").checkVisibility()
            ? item.querySelector(".place").textContent : ""),
          error: !!document.querySelector("#log > li:last-child.error"), trouble: $("trouble").textContent,
          list: [...document.querySelectorAll("#conversations a")].map((entry) => entry.textContent),
          shown: document.querySelector("#conversations [aria-current]")?.textContent ?? "",
          sidebar: shown("sidebar"), invitation: $("invitation").textContent,
          status: $("status").textContent, rate: $("rate").textContent, welcome: shown("welcome"),
          send: shown("send"), stop: shown("stop"), undo: shown("undo"), dialog: $("settings").open,
          model: $("model").value, models: [...$("model").options].map((option) => option.value),
          input: $("input").value, focus: document.activeElement.id || document.activeElement.name,
          busy: $("log").getAttribute("aria-busy"), scroll: $("scroll").scrollTop,
          end: $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 3,
        };"""))


def until(holds, what):
    """Waits until what the page shows is as it should be, and gives it."""
    try:
        return WebDriverWait(browser, PATIENCE, 0.05).until(lambda _: holds(now := state()) and now)
    except TimeoutException:
        raise AssertionError(f"not after {PATIENCE} s: {what}; the page shows {state()}") from None


def visit(base=None, turns=(), key=KEY, model="", **settings):
    """Opens the page as a browser that keeps these things for it, and nothing else."""
    base = base or BASE
    if not browser.current_url.startswith(base + "/"):
        browser.get(base + "/")
    kept = {"turns": list(turns), "settings": {name: str(value) for name, value in settings.items()}, "model": model}
    browser.execute_script("""
        localStorage.clear();
        sessionStorage.clear();
        for (const [name, value] of Object.entries(arguments[0]))
          localStorage.setItem("duck." + name, JSON.stringify(value));
        if (arguments[1]) sessionStorage.setItem("duck.key", arguments[1]);""", kept, key)
    seen.clear()
    browser.get(base + "/")
    return ready() if key == KEY else None


def ready():
    return until(lambda now: now.models == models, "the models are there")


def reload():
    browser.refresh()
    return ready()


def press(*keys):
    ActionChains(browser).send_keys(*keys).perform()


def chord(*keys):
    """Presses the last key while the others are held."""
    chain = ActionChains(browser)
    for key in keys[:-1]:
        chain.key_down(key)
    chain.send_keys(keys[-1])
    for key in keys[:-1]:
        chain.key_up(key)
    chain.perform()


def rewrite(*keys):
    """Replaces what stands in the field that has the focus."""
    chord(Keys.CONTROL, "a")
    press(*keys)


def ended(now):
    return now.send and not now.stop and now.busy != "true"


def send(text, turns=2):
    """Sends a text and waits for the end of the answer."""
    find("#input").send_keys(text, Keys.ENTER)
    return until(lambda now: ended(now) and len(now.turns) == turns, "an answer")


def again():
    """Has the last question answered again, and waits for the end."""
    before = len(seen.chats())
    find("#log > li:last-child .again").click()
    return until(lambda now: ended(now) and len(seen.chats()) > before, "another answer")


def stored():
    """The conversations that the browser keeps, the newest first."""
    texts = browser.execute_script("""
        return Object.keys(localStorage).filter((key) => key.startsWith("duck.conversation.")).map((key) => localStorage[key]);""")
    return sorted(map(json.loads, texts), key=lambda conversation: -conversation["updated"])


def contents(conversation):
    return [message["content"] for message in conversation["messages"].values()]


def entry(title):
    return browser.execute_script("""
        return [...document.querySelectorAll("#conversations a")].find((entry) => entry.textContent === arguments[0]);""", title)


def act(title, action):
    """Opens the menu of a conversation, and chooses from it."""
    ActionChains(browser).move_to_element(entry(title)).perform()
    entry(title).find_element(By.XPATH, "..").find_element(By.CSS_SELECTOR, ".more").click()
    if action:
        find(f"#menu [data-action={action}]").click()


@contextlib.contextmanager
def tab(address):
    """Another tab, which is closed in the end."""
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    size(*WIDE)
    browser.get(address)
    try:
        yield browser.current_window_handle
    finally:
        browser.close()
        browser.switch_to.window(first)


def set_settings(**values):
    find("#open-settings").click()
    for name, value in values.items():
        field = find(f"#settings [name={name}]")
        field.clear()
        field.send_keys(value)
    find("#settings [type=submit]").click()
    until(lambda now: not now.dialog, "the settings are closed")


@contextlib.contextmanager
def offline():
    browser.set_network_conditions(offline=True, latency=0, throughput=1 << 20)
    try:
        yield
    finally:
        browser.delete_network_conditions()


def size(width, height):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})


def scheme(name):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": name}]})


def user(text):
    return {"role": "user", "content": text}


def assistant(text, note=""):
    return {"role": "assistant", "content": text, "note": note}


# The checks. What a check returns are messages that the console may hold after it.


def loads():
    now = visit()
    assert browser.title == "Duck"
    assert now.welcome and not now.turns and not now.dialog and now.send and now.focus == "input", now
    assert now.status == "" and now.model == models[0] and find("#model").is_enabled(), now
    seen.read()
    paths = {urlparse(request["url"]).path for request in seen.requests}
    modules = {f"/{name}.js" for name in ("theme", "page", "archive", "conversation", "markdown", "settings", "sidebar",
                                          "stream", "thread")}
    assert paths == {"/", "/style.css", "/icon.svg", "/v1/models"} | modules, paths
    assert browser.execute_script("return document.querySelector('h1 img').naturalWidth > 0"), "no icon"


def nothing_else_may_load_or_run():
    visit()
    browser.execute_script("""
        window.blocked = [];
        document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
        document.body.append(Object.assign(new Image(), { src: arguments[0] + "/image" }));
        fetch(arguments[0] + "/fetch").catch(() => {});
        const style = document.createElement("style");
        style.textContent = "body { display: none; }";
        document.head.append(style);
        const button = document.createElement("button");
        try { button.setAttribute("onclick", "window.ran = true"); } catch { /* as it should be */ }
        document.body.append(button);
        button.click();
        try { document.body.innerHTML = "<p>"; } catch { /* as it should be */ }""", gate.url)
    expected = {"connect-src", "img-src", "require-trusted-types-for", "style-src-elem"}
    WebDriverWait(browser, PATIENCE).until(
        lambda _: set(browser.execute_script("return window.blocked")) >= expected, f"{expected} are not all enforced")
    assert browser.execute_script("return !window.ran && document.body.children.length > 1"), "text was run"
    assert not gate.paths, gate.paths
    return ["Content Security Policy", "Fetch API cannot load", "assignment. The action has been blocked"]


def controls_have_names():
    visit(turns=[user("hello"), assistant("Quack.")])
    for opened in (False, True):
        if opened:
            find("#open-settings").click()  # nothing outside can be reached then
        scope = "#settings" if opened else "body > :not(dialog)"
        controls = [control for tag in ("button", "input", "select", "textarea")
                    for control in browser.find_elements(By.CSS_SELECTOR, f"{scope} {tag}") if control.is_displayed()]
        assert len(controls) > 5, controls
        nameless = [control.get_attribute("outerHTML") for control in controls if not control.accessible_name.strip()]
        assert not nameless, nameless


def sends_and_shows_the_answer():
    visit(model=MODEL, seed=SEED)
    field = find("#input")
    field.send_keys("  ", Keys.ENTER)
    field.clear()
    field.send_keys("a", Keys.SHIFT, Keys.ENTER, Keys.NULL, "b")
    now = state()
    assert now.input == "a\nb" and not now.turns, f"Shift Enter should break the line, and spaces not be sent: {now}"
    field.clear()
    now = send(QUESTION)
    assert now.turns == [QUESTION, "".join(PIECES)] and now.roles == ["user", "assistant"], now
    note = rf"{TOKENS} tokens · [1-9][\d.]* tokens/s · [\d.]{{1,5}} m?s to the first"
    assert re.fullmatch(note, now.note) and not now.error, now
    assert now.input == "" and now.status == "" and now.rate == "" and now.focus == "input" and not now.welcome, now
    [body] = seen.chats()
    assert body == {"model": MODEL, "messages": [user(QUESTION)], "seed": SEED, "stream": True, "truncation": "auto",
                    "stream_options": {"include_usage": True}} | SAMPLING, body
    # What was said before goes along.
    field.send_keys("And then?")
    find("#send").click()
    until(lambda now: ended(now) and len(now.turns) == 4, "a second answer, by the button")
    sent = seen.chats()[1]["messages"]
    assert sent == [user(QUESTION), {"role": "assistant", "content": "".join(PIECES)}, user("And then?")], sent


def begin(passed=3):
    """A question on a page whose server has sent a few texts, and waits."""
    gate.hold()
    visit(gate.url, model=MODEL, seed=SEED)
    find("#input").send_keys(QUESTION, Keys.ENTER)
    gate.let(passed)
    return until(lambda now: now.turns[1:] == ["".join(PIECES[:passed])] and not now.send and now.stop, "the first texts")


def a_stream_is_shown_as_it_comes():
    now = begin(0)
    assert now.status == "Reading…" and now.busy == "true", now
    for count in range(1, 4):
        gate.let(1)
        now = until(lambda now: now.turns[1] == "".join(PIECES[:count]), f"{count} texts")
        assert now.status == "" and now.stop and not now.send and now.busy == "true", now
    assert now.rate.endswith("tokens/s"), now
    # What is written meanwhile is not sent, and not lost.
    press("more", Keys.ENTER)
    now = state()
    assert now.input == "more" and len(now.turns) == 2, now
    gate.let()
    now = until(ended, "the end")
    assert now.turns[1] == "".join(PIECES) and now.busy == "false" and now.rate == "", now
    assert now.input == "more" and len(seen.chats()) == 1, now


def stops(stop):
    before = begin()
    stop()
    now = until(ended, "the answer is stopped")
    assert now.turns == before.turns and now.note.endswith("stopped") and not now.error and now.status == "", now
    WebDriverWait(browser, PATIENCE).until(lambda _: gate.left == 1, "the request goes on")
    # The part is part of the conversation.
    gate.let()
    kept = reload()
    assert kept.turns == before.turns and kept.note == now.note, kept
    send("And then?", turns=4)
    sent = seen.chats()[1]["messages"]
    assert sent == [user(QUESTION), {"role": "assistant", "content": before.turns[1]}, user("And then?")], sent


def stops_by_button():
    stops(lambda: find("#stop").click())


def stops_by_escape():
    stops(lambda: press(Keys.ESCAPE))


def stops_before_it_begins():
    begin(0)
    find("#stop").click()
    now = until(ended, "the answer is stopped")
    assert now.turns == [QUESTION, ""] and now.note == "stopped" and now.focus == "input" and not now.error, now
    gate.let()
    assert reload().turns == [QUESTION], "an answer that never began is kept"
    assert again().turns == [QUESTION, "".join(PIECES)]


def tries_again():
    visit(turns=[user(QUESTION), assistant("Moo.", "a note"), user(QUESTION), assistant("Baa.", "a note")],
          model=MODEL, seed=SEED)
    now = again()
    assert len(now.turns) == 4 and now.turns[1] == "Moo." and now.turns[3] != "Baa." and "a note" not in now.note, now
    assert now.places == ["", "", "", "2/2"], now
    assert seen.chats()[0]["messages"] == [user(QUESTION), {"role": "assistant", "content": "Moo."}, user(QUESTION)]
    assert reload().turns == [turn for turn in now.turns if turn]
    # An answer in the middle: what followed it stays with it.
    find("#log > li:nth-child(2) .again").click()
    now = until(lambda now: ended(now) and len(seen.chats()) > 1, "another answer in the middle")
    assert now.turns == [QUESTION, "".join(PIECES)] and now.places == ["", "2/2"], now
    find("#log > li:nth-child(2) .earlier").click()
    now = state()
    assert now.turns[1] == "Moo." and now.places == ["", "1/2", "", "2/2"] and len(now.turns) == 4, now
    assert browser.execute_script("return document.activeElement.className") == "link later", "the arrow that is left"
    assert reload().turns == now.turns, "the branch that was chosen is shown"
    # A question that got no answer.
    visit(turns=[user(QUESTION)], model=MODEL, seed=SEED)
    assert again().turns == [QUESTION, "".join(PIECES)]
    # Nothing comes: the answer that was there stays.
    gate.edit = lambda event: {"choices": [], "error": {"message": "no more room"}}
    visit(gate.url, turns=[user(QUESTION), assistant("Moo.")], model=MODEL, seed=SEED)
    now = again()
    assert now.turns == [QUESTION, "Moo."] and now.status == "no more room", now


def a_seed_repeats():
    visit(model=MODEL)
    set_settings(seed=str(SEED), temperature="1.5")
    answers = {send(QUESTION).turns[1], again().turns[1], again().turns[1]}
    assert len(answers) == 1, answers
    assert all(body["seed"] == SEED and body["temperature"] == 1.5 for body in seen.chats()), seen.chats()
    set_settings(seed="")
    for _ in range(20):
        answers.add(again().turns[1])
        if len(answers) > 1:
            break
    assert len(answers) > 1, f"always {answers} without a seed too"
    assert "seed" not in seen.chats()[-1]


def settings_are_used_and_kept():
    values = {"system": "Be a duck.", "temperature": "0.5", "top_p": "0.9", "top_k": "20", "min_p": "0.1",
              "max_tokens": "2", "seed": "7"}
    visit(model=MODEL)
    set_settings(**values)
    reload()
    now = send(QUESTION)
    sent = {name: float(value) for name, value in values.items() if name != "system"}
    body = seen.chats()[0]
    assert {name: body[name] for name in sent} == sent, body
    assert body["messages"] == [{"role": "system", "content": "Be a duck."}, user(QUESTION)], body
    assert "cut at its longest" in now.note or not now.turns[1], now
    # What cannot be is not taken.
    find("#open-settings").click()
    field = find("#settings [name=temperature]")
    field.clear()
    field.send_keys("9", Keys.ENTER)
    assert state().dialog, "a temperature of 9 is taken"
    press(Keys.ESCAPE)
    until(lambda now: not now.dialog, "the settings are closed")
    again()
    assert seen.chats()[1] == body, seen.chats()[1]
    find("#open-settings").click()
    assert field.get_attribute("value") == "0.5"
    find("#reset").click()
    find("#settings [type=submit]").click()
    again()
    assert seen.chats()[2] == {"model": MODEL, "messages": [user(QUESTION)], "stream": True, "truncation": "auto",
                               "stream_options": {"include_usage": True}} | SAMPLING, seen.chats()[2]


def settings_by_keyboard():
    visit()
    until(lambda now: now.focus == "input", "the input has the focus")
    for _ in range(20):
        press(Keys.SHIFT, Keys.TAB, Keys.NULL)
        if state().focus == "open-settings":
            break
    press(Keys.ENTER)
    now = until(lambda now: now.dialog, "Enter opens the settings")
    assert now.focus == "system", now
    for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "theme", "key"):
        press(Keys.TAB)
        assert state().focus == name, (name, state().focus)
    press(Keys.ESCAPE)
    now = until(lambda now: not now.dialog, "Escape closes the settings")
    assert now.focus == "open-settings", f"where the focus was, it comes back: {now}"
    press(Keys.SPACE)
    until(lambda now: now.dialog, "Space opens the settings")
    press(Keys.TAB, "1.1", Keys.ENTER)
    until(lambda now: not now.dialog, "Enter closes the settings")
    # They are kept when the dialog tells that it is closed, which is a moment after it is.
    kept = lambda: json.loads(browser.execute_script("return localStorage.getItem('duck.settings')"))
    WebDriverWait(browser, PATIENCE).until(lambda _: kept()["temperature"] == "1.1", "the settings are kept")


def the_chosen_model_is_used_and_kept():
    visit()
    Select(find("#model")).select_by_value(models[1])
    for _ in range(2):
        before = prompt_tokens(models[1])
        find("#input").send_keys(QUESTION, Keys.ENTER)
        until(lambda now: ended(now) and seen.chats(), "an answer")
        assert {body["model"] for body in seen.chats()} == {models[1]}, seen.chats()
        assert prompt_tokens(models[1]) > before, "another model was used"
        assert reload().model == models[1], state()


def a_conversation_survives_a_reload():
    visit(model=MODEL, seed=SEED)
    before = send(QUESTION)
    now = reload()
    assert (now.turns, now.roles, now.note) == (before.turns, before.roles, before.note) and not now.welcome, now
    now = again()
    assert now.turns == before.turns
    visit(turns=[user("hello"), {"role": "system", "content": "no"}, {"role": "user"}, 7, None])
    assert state().turns == ["hello"], "what is not a turn is left out"
    assert browser.execute_script("return localStorage.getItem('duck.turns')") is None, "it is taken over once"
    browser.execute_script("""
        localStorage.setItem("duck.turns", "{");
        localStorage.setItem("duck.settings", "null");
        const circle = { role: "user", content: "a", id: "a", parent: "a" };
        localStorage.setItem("duck.conversation.a", "{");
        localStorage.setItem("duck.conversation.b", '{"id": "b", "messages": [7, null]}');
        localStorage.setItem("duck.conversation.c", JSON.stringify({ id: "c", head: "a", messages: { a: circle } }));""")
    assert reload().turns == ["hello"], "what is damaged harms nothing else"
    entry("a").click()
    assert until(lambda now: now.turns != ["hello"], "the other one").turns == ["a"]


def conversations_are_kept_apart():
    visit(model=MODEL, seed=SEED)
    for i, question in enumerate(QUESTIONS[:3]):
        find("#new").click()
        now = state()
        assert not now.turns and now.welcome and now.focus == "input" and len(now.list) == i, now
        now = send(question)
        assert now.shown == question and now.list == QUESTIONS[i::-1], now
        assert seen.chats()[i]["messages"] == [user(question)], "what was said elsewhere is sent"
    addresses = [link.get_attribute("href") for link in browser.find_elements(By.CSS_SELECTOR, "#conversations a")]
    assert browser.current_url == addresses[0], "the address names the conversation"
    entry(QUESTIONS[0]).click()
    assert until(lambda now: now.shown == QUESTIONS[0], "the first one").turns[0] == QUESTIONS[0]
    assert reload().turns[0] == QUESTIONS[0], "the one that was shown is shown again"
    browser.back()
    until(lambda now: now.shown == QUESTIONS[2], "back")
    # Search, in what was said too.
    find("#search").send_keys(PIECES[0].strip().lower()[:4] + " " + QUESTIONS[0][:5].upper())
    now = state()
    assert QUESTIONS[0] in now.list, now
    find("#search").send_keys(" no such word")
    assert not state().list and find("#none").text == "Nothing found."
    find("#search").clear()
    find("#search").send_keys(Keys.SPACE)
    # Rename.
    act(QUESTIONS[1], "rename")
    press("Pond", Keys.ESCAPE)
    assert sorted(state().list) == sorted(QUESTIONS[:3]), state()
    act(QUESTIONS[1], "rename")
    press("Pond <b>", Keys.ENTER)
    until(lambda now: "Pond <b>" in now.list and QUESTIONS[1] not in now.list, "another name")
    assert "Pond <b>" in reload().list
    # Delete, and take it back.
    turns = state().turns
    act(QUESTIONS[2], "delete")
    now = until(lambda now: now.undo, "it can be taken back")
    assert now.welcome and QUESTIONS[2] not in now.list and "Deleted" in now.status and len(stored()) == 2, now
    find("#undo").click()
    now = state()
    assert now.turns == turns and now.shown == QUESTIONS[2] and not now.undo and len(stored()) == 3, now
    act("Pond <b>", "delete")
    now = until(lambda now: now.undo, "it can be taken back")
    assert now.turns == turns, "another one that is deleted does not change what is shown"
    assert sorted(reload().list) == sorted([QUESTIONS[0], QUESTIONS[2]])


def an_answer_goes_on_elsewhere():
    """While another conversation is shown."""
    before = begin()
    find("#new").click()
    now = state()
    assert now.welcome and now.send and not now.stop, now
    gate.let()
    WebDriverWait(browser, PATIENCE).until(lambda _: "".join(PIECES) in contents(stored()[0]), "the answer is stored")
    entry(QUESTION).click()
    now = until(lambda now: ended(now) and now.turns, "the end")
    assert now.turns == [QUESTION, "".join(PIECES)] and gate.left == 0, (now, before)
    # One that is deleted ends.
    begin()
    act(QUESTION, "delete")
    WebDriverWait(browser, PATIENCE).until(lambda _: gate.left == 1, "the request goes on")
    now = until(lambda now: now.undo, "it can be taken back")
    assert now.welcome and not now.list and not stored(), now
    find("#undo").click()
    assert until(ended, "the end").turns == before.turns


def two_tabs_lose_nothing():
    visit(model=MODEL, seed=SEED)
    send(QUESTION)
    address = browser.current_url
    first = browser.current_window_handle
    with tab(BASE + "/") as second:
        if KEY:
            browser.execute_script("sessionStorage.setItem('duck.key', arguments[0])", KEY)
            browser.refresh()
        ready()
        # Another conversation, and the same one.
        send("In the second tab")
        browser.switch_to.window(first)
        until(lambda now: "In the second tab" in now.list, "the list of the first tab")
        send("And then?", turns=4)
        browser.switch_to.window(second)
        entry(QUESTION).click()
        until(lambda now: len(now.turns) == 4, "what the first tab said")
        send("From the second", turns=6)
        browser.switch_to.window(first)
        now = until(lambda now: len(now.turns) == 6, "what the second tab said")
        assert now.turns[4] == "From the second", now
        # Both at once, from the same place: two branches.
        find("#input").send_keys("One", Keys.ENTER)
        browser.switch_to.window(second)
        find("#input").send_keys("Two", Keys.ENTER)
        until(ended, "an answer")
        browser.switch_to.window(first)
        until(ended, "an answer")
        # As if the second tab had not seen what the first wrote: it is written again.
        key = "duck.conversation." + address.split("#")[1]
        browser.switch_to.window(second)
        browser.execute_script("""
            const old = JSON.parse(localStorage.getItem(arguments[0]));
            for (const [id, message] of Object.entries(old.messages)) if (message.content === "One") delete old.messages[id];
            localStorage.setItem(arguments[0], JSON.stringify(old));""", key)
        complete = lambda: {"One", "Two", "And then?", "From the second"} <= set(contents(next(
            conversation for conversation in stored() if conversation["id"] == address.split("#")[1])))
        WebDriverWait(browser, PATIENCE).until(lambda _: complete(), "a message is lost")
        # The same with a new title.
        browser.switch_to.window(first)
        act(QUESTION, "rename")
        press("A new title", Keys.ENTER)
        browser.switch_to.window(second)
        until(lambda now: "A new title" in now.list, "the new title in the second tab")
        browser.execute_script("""
            const old = JSON.parse(localStorage.getItem(arguments[0]));
            localStorage.setItem(arguments[0], JSON.stringify({ ...old, title: "", renamed: 0 }));""", key)
        titles = lambda: [conversation["title"] for conversation in stored()]
        WebDriverWait(browser, PATIENCE).until(lambda _: "A new title" in titles(), "the title is lost")
        # Deleted where it is shown elsewhere.
        act("A new title", "delete")
        browser.switch_to.window(first)
        now = until(lambda now: "deleted" in now.status, "the first tab says that it is deleted")
        assert len(now.turns) > 6, "what is on the screen stays there"
        send("Still here", turns=len(now.turns) + 2)
        assert complete(), "what was on the screen is stored again"
        browser.switch_to.window(second)
    return ["401"] if KEY else []


def a_reload_during_a_stream_keeps_what_came():
    before = begin()
    WebDriverWait(browser, PATIENCE).until(lambda _: before.turns[1] in contents(stored()[0]), "what came is stored")
    gate.let(2)
    half = until(lambda now: now.turns[1] == "".join(PIECES[:5]), "two more texts").turns
    # A second later that is stored too.
    gate.let(1)
    time.sleep(1.1)
    gate.let(1)
    half = until(lambda now: now.turns[1] == "".join(PIECES[:7]), "two more texts").turns
    WebDriverWait(browser, PATIENCE).until(lambda _: half[1] in contents(stored()[0]), "it is stored every second")
    find("#input").send_keys("half a thought")
    now = reload()
    assert now.turns == half and now.note == "not finished" and now.send and not now.stop, now
    assert now.input == "half a thought", "what was being written is lost"
    gate.let()
    now = again()
    assert now.turns == [QUESTION, "".join(PIECES)] and now.places == ["", "2/2"], now
    find("#log > li:last-child .earlier").click()
    assert state().turns == half, "the half is one of the versions"


def edits_and_branches():
    visit(turns=[user("first"), assistant("Moo."), user("second"), assistant("Baa.")], model=MODEL, seed=SEED)
    find("#log > li:nth-child(3) .edit").click()
    rewrite(QUESTION, Keys.ENTER)
    now = until(lambda now: ended(now) and len(seen.chats()) == 1 and len(now.turns) == 4, "an answer")
    assert now.turns[:3] == ["first", "Moo.", QUESTION] and now.places == ["", "", "2/2", ""], now
    said = [user("first"), {"role": "assistant", "content": "Moo."}]
    assert seen.chats()[0]["messages"] == [*said, user(QUESTION)], "what was edited away is sent"
    changed = now.turns
    # The earlier branch is there, whole, and after a reload.
    reload()
    find("#log > li:nth-child(3) .earlier").click()
    assert state().turns == ["first", "Moo.", "second", "Baa."], state()
    find("#log > li:nth-child(3) .later").click()
    assert state().turns == changed, state()
    # Escape leaves all as it was; nothing is sent empty; the arrow up edits the last question.
    find("#input").send_keys(Keys.ARROW_UP)
    press("x", Keys.ESCAPE)
    assert state().turns == changed and not browser.find_elements(By.CSS_SELECTOR, ".editor")
    assert browser.execute_script("return document.activeElement.className") == "link edit", "the focus comes back"
    find("#log > li:nth-child(1) .edit").click()
    rewrite(Keys.DELETE, Keys.ENTER)
    assert browser.find_elements(By.CSS_SELECTOR, ".editor"), "nothing was sent"
    press("third")
    find(".editor [type=submit]").click()
    now = until(lambda now: ended(now) and len(now.turns) == 2, "an answer")
    assert now.turns[0] == "third" and now.places[0] == "2/2", now
    assert set(contents(stored()[0])) > {"first", "Moo.", "second", "Baa.", QUESTION, "third"}


def exports():
    turns = [user("first # one"), assistant("Moo.\n\n```\ncode\n```"), user("second"), assistant("Baa.")]
    visit(turns=turns, model=MODEL, seed=SEED)
    find("#log > li:nth-child(3) .edit").click()
    rewrite(QUESTION, Keys.ENTER)
    now = until(lambda now: ended(now) and seen.chats() and len(now.turns) == 4, "an answer")
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": folder})

    def exported(action, name):
        file = Path(folder, name)
        act("first # one", action)
        WebDriverWait(browser, PATIENCE).until(lambda _: file.exists() and file.stat().st_size, f"no {name}")
        return file.read_text()

    text = exported("markdown", "first-one.md")
    parts = ["# first # one", "**You**", "first # one", "**Model**", turns[1]["content"], "**You**", QUESTION, f"**{MODEL}**",
             now.turns[3]]
    assert text == "\n\n".join(parts) + "\n", text
    whole = json.loads(exported("json", "first-one.json"))
    assert whole["title"] == "first # one" and len(whole["messages"]) == 6, whole
    assert {"second", "Baa.", QUESTION} < {message["content"] for message in whole["messages"]}, "all branches are there"


MARKDOWN = """# A pond
Water, *reeds* and **ducks**:
1. one
2. two
   - inner `code`

> quoted

| a | b |
|---|--:|
| 1 | 2 |

```rust
fn main() { println!("<b>quack</b>"); }
```

[a page](https://example.org/x) and https://example.org/y."""

HOSTILE = """<img src=x onerror="window.ran = true"><script>window.ran = true</script>

[x](javascript:window.ran=true) [y](data:text/html,<script>window.ran=true</script>) [z](/v1/models) <javascript:window.ran=true>

![image](https://example.org/i.png) <svg onload=window.ran=true> [q](vbscript:x) [JaVa](JAVASCRIPT:window.ran=true)
[s]( javascript:window.ran=true) [t](java\tscript:window.ran=true) [u](&#106;avascript:window.ran=true)

```<img src=x onerror=window.ran=true>
<img src=x onerror=window.ran=true>
```"""


def markdown_is_shown():
    visit(turns=[user("# not a heading"), assistant(MARKDOWN)])
    shown = browser.execute_script("""
        const text = document.querySelector(".assistant .text");
        return Object.fromEntries(["h3", "em", "strong", "ol > li", "ol ul li code", "blockquote", "thead th", "td.right",
          "figure pre code", "figcaption span", "a"].map((name) => [name, [...text.querySelectorAll(name)].map((node) => node.textContent)]));""")
    assert shown == {
        "h3": ["A pond"], "em": ["reeds"], "strong": ["ducks"], "ol > li": ["one", "twoinner code"], "ol ul li code": ["code"],
        "blockquote": ["quoted"], "thead th": ["a", "b"], "td.right": ["2"], "figcaption span": ["rust"],
        "figure pre code": ['fn main() { println!("<b>quack</b>"); }'], "a": ["a page", "https://example.org/y"]}, shown
    for link in browser.find_elements(By.CSS_SELECTOR, ".assistant .text a"):
        assert link.get_attribute("href").startswith("https://example.org/"), link.get_attribute("href")
        assert (link.get_attribute("rel"), link.get_attribute("target")) == ("noopener noreferrer", "_blank")
    assert find(".user .text").text == "# not a heading", "what the user wrote is shown as it was written"
    grant_clipboard()
    find(".copy-code").click()
    until(lambda now: now.status == "Copied.", "it is said that the code is copied")
    assert clipboard() == 'fn main() { println!("<b>quack</b>"); }'
    browser.execute_cdp_cmd("Browser.resetPermissions", {})


def markdown_is_safe():
    visit(turns=[user(HOSTILE), assistant(HOSTILE)])
    assert not browser.find_elements(By.CSS_SELECTOR, "#log img, #log script, #log svg"), "text became HTML"
    links = browser.find_elements(By.CSS_SELECTOR, "#log a")
    assert [link.get_attribute("href") for link in links] == ["https://example.org/i.png"], [l.get_attribute("href") for l in links]
    for link in links:
        browser.execute_script("arguments[0].removeAttribute('href'); arguments[0].click()", link)
    assert browser.execute_script("return window.ran") is None, "text was run"
    text = find(".assistant .text").text
    assert "<script>window.ran = true</script>" in text and "[x](javascript:window.ran=true)" in text, text
    # Hostile in length: the page stays quick.
    for text in ("*a " * 20000, "[" * 50000, "> " * 20000, "|" * 20000 + "\n" + "|-" * 20000, "`" * 500 + "a", "- " * 9000):
        begun = time.monotonic()
        visit(turns=[user("x"), assistant(text)])
        assert time.monotonic() - begun < 20, text[:20]


def a_stream_of_markdown_keeps_what_is_drawn():
    pieces = iter(MARKDOWN.split("\n\n") + [""] * 99)

    def replace(event):
        event["choices"][0]["delta"]["content"] = next(pieces) + "\n\n"
        return event

    gate.edit = replace
    gate.hold()
    visit(gate.url, model=MODEL, seed=SEED)
    find("#input").send_keys(QUESTION, Keys.ENTER)
    gate.let(2)
    until(lambda now: "quoted" in now.turns[-1], "the first blocks")
    browser.execute_script("document.querySelector('.assistant h3').id = 'drawn'")
    gate.let()
    until(lambda now: ended(now) and "println" in now.turns[-1], "the end")
    assert find("#drawn").text == "A pond", "a block that did not change was drawn again"


def the_theme_is_chosen_and_kept():
    def ground():
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return "light" if sum(int(value) for value in colour[4:-1].split(",")) > 382 else "dark"

    def choose(theme):
        find("#open-settings").click()
        Select(find("#settings [name=theme]")).select_by_value(theme)
        assert theme == "system" or ground() == theme, "it is seen at once"
        find("#settings [type=submit]").click()

    visit()
    for theme in ("dark", "light"):
        choose(theme)
        for system in ("light", "dark"):
            scheme(system)
            reload()
            assert ground() == theme, (theme, system)
        with tab(BASE + "/"):
            until(lambda now: ground() == theme, "another tab has it too")
            press(Keys.ESCAPE)
    choose("system")
    for system in ("light", "dark"):
        scheme(system)
        assert ground() == system
    return ["401"] if KEY else []  # other tabs ask for it


def shortcuts():
    visit(turns=[user("hello"), assistant("Quack.")])
    chord(Keys.CONTROL, Keys.SHIFT, "o")
    now = until(lambda now: now.welcome, "a new conversation")
    assert now.focus == "input" and now.list == ["hello"], now
    chord(Keys.CONTROL, "k")
    until(lambda now: now.focus == "search", "the search")
    chord(Keys.CONTROL, Keys.SHIFT, "s")
    until(lambda now: not now.sidebar, "the list is away")
    assert not reload().sidebar, "it stays away"
    chord(Keys.CONTROL, "k")
    now = until(lambda now: now.sidebar and now.focus == "search", "the search shows the list")
    chord(Keys.CONTROL, "/")
    WebDriverWait(browser, PATIENCE).until(lambda _: find("#shortcuts").is_displayed(), "the list of shortcuts")
    assert "New conversation" in find("#shortcuts").text
    press(Keys.ESCAPE)
    assert not find("#shortcuts").is_displayed()
    find("#open-shortcuts").click()
    chord(Keys.CONTROL, Keys.SHIFT, "o")
    until(lambda now: now.focus == "input" and not find("#shortcuts").is_displayed(), "a shortcut works from the list too")


def by_keyboard_alone():
    visit(turns=[user("hello"), assistant("Quack.")], model=MODEL, seed=SEED)
    chord(Keys.CONTROL, Keys.SHIFT, "o")
    chord(Keys.CONTROL, "k")
    press(Keys.TAB)
    assert browser.switch_to.active_element.text == "hello"
    press(Keys.ENTER)
    until(lambda now: now.turns == ["hello", "Quack."], "Enter opens a conversation")
    entry("hello").send_keys(Keys.TAB)
    press(Keys.ENTER)
    assert browser.switch_to.active_element.text == "Rename", "Enter opens its menu"
    press(Keys.ENTER)
    rewrite("pond", Keys.ENTER)
    until(lambda now: now.list == ["pond"], "another name")
    assert browser.switch_to.active_element.text == "pond", "the focus comes back"
    press(Keys.TAB, Keys.ENTER, Keys.TAB, Keys.TAB, Keys.TAB)
    assert browser.switch_to.active_element.text == "Delete"
    press(Keys.ESCAPE)
    assert not find("#menu").is_displayed() and state().list == ["pond"]
    press(Keys.ENTER, Keys.TAB, Keys.TAB, Keys.TAB, Keys.ENTER)
    until(lambda now: now.focus == "undo" and not now.list, "deleted, and Undo has the focus")
    press(Keys.ENTER)
    until(lambda now: now.turns == ["hello", "Quack."], "it is back")


def storage_may_be_full():
    visit(model=MODEL, seed=SEED)
    send(QUESTION)
    browser.execute_script("""
        for (let size = 1 << 22; size > 0; size >>= 1)
          for (let i = 0; ; i += 1)
            try { localStorage.setItem(`fill.${size}.${i}`, "x".repeat(size)); } catch { break; }""")
    now = send("And then?", turns=4)
    assert "full" in now.trouble and now.turns[2] == "And then?", now
    assert len(contents(stored()[0])) == 2, "it was not full"
    first = browser.current_url
    find("#new").click()
    now = send(QUESTION)
    assert "full" in now.trouble and len(now.list) == 2, now
    entry(QUESTION).click()
    # As soon as there is room, all of it is stored.
    browser.execute_script("for (const key of Object.keys(localStorage)) if (key.startsWith('fill.')) localStorage.removeItem(key)")
    act(now.list[0], "rename")
    rewrite("room", Keys.ENTER)
    until(lambda now: now.trouble == "", "it is stored")
    assert sorted(len(contents(conversation)) for conversation in stored()) == [2, 4], stored()
    # Not at all: the page works, and says so.
    visit(model=MODEL, seed=SEED)
    browser.execute_script("Storage.prototype.setItem = () => { throw new DOMException('no', 'SecurityError'); }")
    now = send(QUESTION)
    assert "stores nothing" in now.trouble and now.turns[1] == "".join(PIECES) and now.list == [QUESTION], now
    assert first
    browser.get("about:blank")  # or the next check is asked whether to leave


def a_model_of_texts_continues_them():
    gate.texts_only = {MODEL}
    visit(gate.url, model=MODEL, seed=SEED)
    now = until(lambda now: now.invitation == "Begin a text.", "an invitation to begin a text")
    assert "continues text" in find("#welcome").text and find("#send").text == "Continue", now
    now = send("One day the duck ")
    [body] = seen.chats()
    assert body == {"model": MODEL, "prompt": "One day the duck ", "max_tokens": 128, "seed": SEED, "stream": True, "truncation": "auto",
                    "stream_options": {"include_usage": True}} | SAMPLING, body
    first = contents(stored()[0])[1]
    assert first and now.turns == ["One day the duck ", first], now
    # Nothing more, and it goes on; something more, and it goes on with that.
    now = send("", turns=3)
    second = contents(stored()[0])[2]
    assert seen.chats()[1]["prompt"] == "One day the duck " + first
    now = send("And then", turns=5)
    text = "One day the duck " + first + second
    assert seen.chats()[2]["prompt"] == text + ("" if text[-1].isspace() else "\n") + "And then", seen.chats()[2]
    # Chat models are still chatted with.
    Select(find("#model")).select_by_value(next(model for model in models if model != MODEL))
    find("#new").click()
    assert state().invitation == "Say something."


def thirty_questions_are_answered():
    visit(model=models[0], seed=7)
    for i, question in enumerate(QUESTIONS):
        now = send(question, turns=2 * i + 2)
        assert not now.error and now.turns[-1].strip() and "cut" not in now.note, (question, now.turns[-1], now.note)
    assert "without the oldest" in now.note, f"the context was never full: {now.note}"
    assert len(QUESTIONS) == 30 and reload().turns == now.turns


def a_message_that_is_too_long_is_edited():
    visit(model=MODEL, seed=SEED)
    browser.execute_script("document.getElementById('input').value = arguments[0]", "pond " * 6000)
    now = send("")
    assert now.error and now.turns[1] == "" and "shorten the message" in now.note, now
    find(".user .edit").click()
    rewrite(QUESTION, Keys.ENTER)
    now = until(lambda now: ended(now) and len(seen.chats()) == 2, "an answer")
    assert now.turns == [QUESTION, "".join(PIECES)] and now.places[0] == "2/2" and not now.error, now
    assert seen.chats()[1]["messages"] == [user(QUESTION)]
    return ["400"]


def a_server_that_restarts_loses_nothing():
    environment = {name: value for name, value in os.environ.items() if name != "DUCK_API_KEY"}

    def serve(port):
        server = subprocess.Popen([arguments.duck, "serve", "duck=" + str(HERE / "../../../duck/duck.gguf"), "--port", str(port)],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
        return server, server.stdout.readline().strip()

    global own
    server, url = serve(0)
    own = url
    try:
        visit(url, key="", seed=SEED)
        until(lambda now: now.models == ["duck"], "the model is there")
        first = send(QUESTION)
        server.terminate()
        server.wait()
        now = send("Are you there?", turns=4)
        assert now.error and now.note == "the server does not answer", now
        server, _ = serve(urlparse(url).port)
        now = again()
        assert now.turns[:3] == [*first.turns, "Are you there?"] and now.turns[3] and not now.error, now
        browser.refresh()
        assert until(lambda now: now.models, "the model is there").turns == now.turns
    finally:
        server.kill()
        server.wait()
    return ["Failed to load resource: net::"]


def grant_clipboard():
    browser.execute_cdp_cmd("Browser.grantPermissions",
                            {"origin": BASE, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})


def clipboard():
    return browser.execute_async_script("navigator.clipboard.readText().then(arguments[0], arguments[0])")


def html_is_text():
    attack = "<img src=x onerror='window.ran = true'><script>window.ran = true</script><b>&amp;</b>"

    def replace(event):
        event["choices"][0]["delta"]["content"] = attack
        return event

    gate.edit = replace
    visit(gate.url, model=MODEL, seed=SEED)
    asked = "<img src=x onerror=window.ran=1>"
    now = send(asked)
    for now in (now, reload()):
        assert now.turns == [asked, attack * now.turns[1].count("<img")] and attack in now.turns[1], now
        assert not browser.find_elements(By.CSS_SELECTOR, "#log img, #log script, #log b"), "text became HTML"
        assert browser.execute_script("return window.ran") is None, "a script ran"
        assert find("#log .user .text").text == asked


def copies():
    visit(turns=[user("hello"), assistant("Quack <b>\n quack.")])
    permission = {"origin": BASE, "permission": {"name": "clipboard-write"}}
    browser.execute_cdp_cmd("Browser.setPermission", permission | {"setting": "denied"})
    find(".assistant .copy").click()
    until(lambda now: "does not let" in now.status, "it is said that copying is not allowed")
    assert find("#status.error")
    grant_clipboard()
    find(".assistant .copy").click()
    until(lambda now: now.status == "Copied.", "it is said that the text is copied")
    copied = clipboard()
    browser.execute_cdp_cmd("Browser.resetPermissions", {})
    assert copied == "Quack <b>\n quack.", copied


def a_long_conversation_scrolls():
    def tall(event):
        event["choices"][0]["delta"]["content"] = "Quack.\n" * 20
        return event

    def wheel(by):
        origin = ScrollOrigin.from_element(find("#scroll"))
        ActionChains(browser).scroll_from_origin(origin, 0, by).perform()

    visit(turns=[user("hello"), assistant("Quack.\n" * 100)] * 3)
    now = state()
    assert now.scroll > 1000 and now.end, f"it begins at the end: {now.scroll}"
    assert browser.execute_script("return document.scrollingElement.scrollHeight <= innerHeight"), "the page scrolls whole"
    gate.edit = tall
    begin(0)
    gate.let(5)
    until(lambda now: now.turns[1].count("Quack.") == 100 and now.end, "the end is followed")
    wheel(-700)
    before = until(lambda now: not now.end, "the wheel scrolls up")
    gate.let()
    now = until(ended, "the end")
    assert now.turns[1].count("Quack.") == 20 * len(PIECES) and now.scroll == before.scroll, "whoever reads above is left there"


def what_does_not_fit_is_left_out():
    long = "pond " * 6000
    visit(turns=[user(long), assistant("Quack.")] * 2, model=MODEL, seed=SEED)
    now = send(QUESTION, turns=6)
    assert now.turns[5] == "".join(PIECES) and "without the oldest 4 messages" in now.note, now
    assert len(seen.chats()) == 1 and len(seen.chats()[0]["messages"]) == 5, "the server leaves them out"
    # A message that is too long is left behind by the next one.
    visit(turns=[user(long)], model=MODEL, seed=SEED)
    now = send(QUESTION, turns=3)
    assert now.turns[2] == "".join(PIECES) and "without the oldest message" in now.note, now


def the_server_goes_away():
    visit(model=MODEL, seed=SEED)
    with offline():
        now = send(QUESTION)
        assert now.error and now.note == "the server does not answer" and now.turns == [QUESTION, ""], now
    now = again()
    assert now.turns == [QUESTION, "".join(PIECES)] and not now.error, now
    # In the middle of an answer.
    before = begin()
    gate.broken = True
    now = until(ended, "the answer ends")
    assert now.error and now.note.endswith("the server does not answer") and now.turns == before.turns, now
    gate.let()
    assert again().turns == [QUESTION, "".join(PIECES)]
    # The server says itself that it cannot go on.
    gate.edit = lambda event: {"choices": [], "error": {"message": "no more room"}}
    find("#new").click()
    now = send(QUESTION)
    assert now.error and now.note == "no more room" and now.turns[1] == "", now
    gate.edit = lambda event: event
    assert again().turns == [QUESTION, "".join(PIECES)]
    # It is not there from the beginning.
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/v1/models"]})
    browser.refresh()
    until(lambda now: now.status == "The server does not answer.", "it is said that the server does not answer")
    assert not find("#model").is_enabled()
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    find("#input").send_keys("And then?", Keys.ENTER)
    assert ready().input == "And then?", "what was written is kept until there is a model to answer it"
    send("", turns=4)
    return ["Failed to load resource: net::"]


SHOWN = """
    const shown = (element) => {
      const { width, height } = element.getBoundingClientRect();
      return element.checkVisibility() && width > 1 && height > 1;
    };
    const all = [...document.body.querySelectorAll("*")].filter(shown);
    const name = (element) => `${element.tagName.toLowerCase()}#${element.id}.${element.className}`;"""

CONTRASTS = SHOWN + """
    const parse = (colour) => {
      if (!/^rgba?\\(/.test(colour)) throw new Error(colour);
      const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
      return [r, g, b, a];
    };
    const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
    const behind = (element) => over(parse(getComputedStyle(element).backgroundColor),
      element.parentElement ? behind(element.parentElement) : [128, 128, 128]);
    const light = (colour) => {
      const [r, g, b] = colour.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (element, part) => {
      const ground = behind(element);
      const [a, b] = [light(over(parse(getComputedStyle(element, part).color), ground)), light(ground)];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    };
    const found = [];
    for (const element of all) {
      if ([...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || element.tagName === "SELECT")
        found.push([name(element), contrast(element)]);
      if (element.placeholder) found.push([name(element) + "::placeholder", contrast(element, "::placeholder")]);
    }
    return found;"""

TOO_WIDE = SHOWN + """
    return all.filter((element) => {
      const { left, right } = element.getBoundingClientRect();
      const { overflowX, display } = getComputedStyle(element);
      if (element.closest("pre, .table")) return false; // what is wide in them can be scrolled to
      const cut = display !== "inline" && overflowX !== "visible" && element.scrollWidth > element.clientWidth + 1;
      return left < -0.5 || right > innerWidth + 0.5 || cut;
    }).map(name).concat(document.documentElement.scrollWidth > innerWidth ? ["the page"] : []);"""

HIDDEN = """
    return arguments[0].filter((selector) => {
      const element = document.querySelector(selector);
      const { left, right, top, bottom } = element.getBoundingClientRect();
      const at = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
      return left < 0 || right > innerWidth || top < 0 || bottom > innerHeight || !(at && element.contains(at));
    });"""


def light_and_dark_are_readable():
    grounds = []
    for name in ("light", "dark"):
        scheme(name)
        visit(turns=[user("hello"), assistant(MARKDOWN, "5 tokens"), user("hello"), assistant("Quack.", "a fault")])
        # All that it can show, at once.
        browser.execute_script("""
            document.querySelector("#log > li:last-child").classList.add("error");
            for (const id of ["stop", "undo", "welcome"]) document.getElementById(id).hidden = false;
            document.getElementById("rate").textContent = "5 tokens/s";
            document.getElementById("status").textContent = "status";
            document.getElementById("trouble").textContent = "trouble";
            document.querySelector(".edit").click();""")
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(int(value) for value in ground[4:-1].split(",")))
        shown = browser.execute_script(CONTRASTS)
        browser.execute_script("document.getElementById('status').className = 'error'")
        shown += browser.execute_script(CONTRASTS)
        find("#open-settings").click()
        shown += browser.execute_script(CONTRASTS)
        assert len(shown) > 60, shown
        faint = {element: round(ratio, 2) for element, ratio in shown if ratio < 4.5}
        assert not faint, f"{name}: contrasts below 4.5: {faint}"
    assert grounds[0] > 3 * 200 and grounds[1] < 3 * 60, f"backgrounds of light and dark: {grounds}"


def it_fits(width, height):
    size(width, height)
    turns = [user("hello"), assistant("Quack. " * 50, "50 tokens · 5 tokens/s · 1 s to the first · stopped"),
             user("x" * 400), assistant("y" * 400 + "\n" + "long " * 200),
             user(QUESTION), assistant(MARKDOWN.replace("quack", "quack " * 90) + "\n\n" + "|a" * 40 + "|\n" + "|-" * 40 + "|")]
    composer = ["#input", "#send", "#new", "#open-settings", "#model"]
    for kept in ([], turns):
        visit(turns=kept)
        browser.execute_script("document.querySelector('#model option').textContent = 'a-long-name'.repeat(9)")
        for text in ("", "A line.\n" * 60, "z" * 400):
            browser.execute_script("""
                const input = document.getElementById("input");
                input.value = arguments[0];
                input.dispatchEvent(new Event("input"));""", text)
            assert not (wide := browser.execute_script(TOO_WIDE)), f"wider than {width}: {wide}"
            assert not (hidden := browser.execute_script(HIDDEN, composer)), f"not to be seen: {hidden}"
    # The list, and the menu of its last entry, where it covers the conversation too.
    if not find("#sidebar").is_displayed():
        find("#toggle-sidebar").click()
    act("hello", None)
    assert not (wide := browser.execute_script(TOO_WIDE)), f"wider than {width}: {wide}"
    assert not (hidden := browser.execute_script(HIDDEN, ["#search", "#menu", "#menu [data-action=delete]"])), hidden
    press(Keys.ESCAPE)
    if not find("#new").is_displayed() or browser.execute_script(HIDDEN, ["#new"]):
        press(Keys.ESCAPE)
    size(width, 400)  # as above the keyboard of a telephone
    assert not (hidden := browser.execute_script(HIDDEN, composer)), f"not to be seen: {hidden}"
    find("#open-settings").click()
    assert not (wide := browser.execute_script(TOO_WIDE)), f"wider than {width}: {wide}"
    for selector in ("#settings h2", "#settings [name=key]", "#settings [type=submit]"):
        browser.execute_script("document.querySelector(arguments[0]).scrollIntoView({ block: 'nearest' })", selector)
        assert not browser.execute_script(HIDDEN, [selector]), f"{selector} cannot be reached"


def it_fits_a_desk():
    it_fits(*WIDE)


def it_fits_a_hand():
    it_fits(*NARROW)


def key_is_wrong():
    until(lambda now: now.dialog and now.focus == "key" and "API key is wrong" in find("#settings").text,
          "the page says that the key is wrong")


def a_key_is_asked_for():
    visit(key=None, model=MODEL, seed=SEED)
    now = until(lambda now: now.dialog, "the page asks for a key")
    assert now.focus == "key" and not now.models, now
    assert "asks for an API key" in find("#settings").text, "it is not said why"
    assert find("#settings [name=key]").get_attribute("type") == "password", "the key is shown"
    press("wrong", Keys.ENTER)
    key_is_wrong()
    field = find("#settings [name=key]")
    field.clear()
    field.send_keys(KEY, Keys.ENTER)
    now = ready()
    assert not now.dialog and now.status == "", now
    assert send(QUESTION).turns[1] == "".join(PIECES)
    reload()
    field = find("#settings [name=key]")
    assert again().turns[1] == "".join(PIECES), "the key is kept as long as the tab"
    assert KEY not in browser.execute_script("return JSON.stringify(localStorage)"), "the key is kept for ever"
    # Another tab, where it was never said.
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(BASE + "/")
    until(lambda now: now.dialog and not now.models, "another tab asks again")
    browser.close()
    browser.switch_to.window(first)
    # A key that the server no longer takes, when a message is sent.
    find("#open-settings").click()
    field.clear()
    field.send_keys("wrong", Keys.ENTER)
    key_is_wrong()
    press(Keys.ESCAPE)
    now = send("And then?", turns=4)
    assert now.error and now.note == "the API key is wrong", now
    key_is_wrong()
    return ["401"]


def pictures(folder):
    def away():
        visit(model=MODEL)
        with offline():
            send(QUESTION)

    def chat():
        visit(model=MODEL, seed=SEED)
        send(QUESTION)
        send("And then?", turns=4)

    def several(turns):
        """Beside a few older conversations."""
        for question in QUESTIONS[:6]:
            old = {"id": question, "title": question, "created": 1, "updated": 1, "head": None, "messages": {}}
            browser.execute_script("localStorage.setItem('duck.conversation.' + arguments[0], arguments[1])", question, json.dumps(old))
        browser.execute_script("localStorage.setItem('duck.turns', arguments[0])", json.dumps(turns))
        browser.get(BASE + "/")
        ready()

    def code():
        visit()
        several([user("Show me what you can write"), assistant(MARKDOWN, "96 tokens · 210 tokens/s · 21 ms to the first")])
        browser.execute_script("document.getElementById('scroll').scrollTop = 0")

    def long():
        visit()
        turns = [turn for question in QUESTIONS[:8] for turn in (user(question), assistant("Quack! " * 12, "24 tokens"))]
        several(turns)
        find("#log > li:nth-child(15) .edit").click()

    def list():
        visit()
        several([user(QUESTION), assistant("I am Duck.", "5 tokens")])
        if not find("#sidebar").is_displayed():
            find("#toggle-sidebar").click()
        act(QUESTIONS[2], None)

    def texts():
        gate.texts_only = {MODEL}
        visit(gate.url, model=MODEL)

    shots = {
        "welcome": visit,
        "chat": lambda: (chat(), again(), again()),
        "code": code,
        "long": long,
        "list": list,
        "stream": lambda: begin(6),
        "unanswered": lambda: visit(turns=[user(QUESTION)]),
        "away": away,
        "settings": lambda: (visit(), find("#open-settings").click()),
        "shortcuts": lambda: (visit(), chord(Keys.CONTROL, "/")),
        "texts": texts,
    }
    if KEY:
        shots["key"] = lambda: (visit(key=None), until(lambda now: now.dialog, "the page asks for a key"))
    os.makedirs(folder, exist_ok=True)
    for shape, where in {"wide": WIDE, "narrow": NARROW}.items():
        for light in ("light", "dark"):
            size(*where)
            scheme(light)
            for shot, prepare in shots.items():
                gate.reset()
                prepare()
                browser.save_screenshot(f"{folder}/{shot}-{shape}-{light}.png")


models = [model["id"] for model in json.loads(ask("/v1/models"))["data"]]
assert len(models) > 1, f"expected a server with two models, found: {models}"
# An answer that is long enough to be stopped in the middle.
answers = ((model, seed, *answer(model, seed)) for model in models for seed in range(50))
MODEL, SEED, PIECES, TOKENS = next((found for found in answers if len(found[2]) >= 12), [None] * 4)
assert MODEL, f"none of {models} answers {QUESTION!r} with more than a few tokens"

checks = [loads, nothing_else_may_load_or_run, controls_have_names, sends_and_shows_the_answer,
          a_stream_is_shown_as_it_comes, stops_by_button, stops_by_escape, stops_before_it_begins, tries_again,
          a_seed_repeats, settings_are_used_and_kept, settings_by_keyboard, the_chosen_model_is_used_and_kept,
          a_conversation_survives_a_reload, conversations_are_kept_apart, an_answer_goes_on_elsewhere, two_tabs_lose_nothing,
          a_reload_during_a_stream_keeps_what_came, edits_and_branches, exports, html_is_text, markdown_is_shown,
          markdown_is_safe, a_stream_of_markdown_keeps_what_is_drawn, copies, a_long_conversation_scrolls,
          what_does_not_fit_is_left_out, a_message_that_is_too_long_is_edited, thirty_questions_are_answered,
          the_server_goes_away, storage_may_be_full, a_model_of_texts_continues_them, the_theme_is_chosen_and_kept, shortcuts,
          by_keyboard_alone, light_and_dark_are_readable, it_fits_a_desk, it_fits_a_hand]
if arguments.duck:
    checks.append(a_server_that_restarts_loses_nothing)
if KEY:
    checks.append(a_key_is_asked_for)
if arguments.only:
    checks = [check for check in checks if arguments.only in check.__name__]
gate = Gate()
own = gate.url  # of a server that a check starts
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, start() as browser:
    seen = Seen()
    for check in checks:
        gate.reset()
        size(*WIDE)
        scheme("light")
        seen.check(check() or [])
        print("ok", check.__name__, flush=True)
    if arguments.screenshots:
        pictures(arguments.screenshots)
print(f"{len(checks)} passed, 0 failed")
