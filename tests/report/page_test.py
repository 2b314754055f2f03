"""The page in a real browser: it opens offline, is used by hand, and shows texts as texts."""

import json
import shutil
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from montessori_jax.cli import run
from montessori_jax.report.page import FIGURES, NAME, write_page
from tests.report.browser import Browser
from tests.report.run_folder import write_run

ROWS = "return [...document.querySelectorAll('#samples-table .open')].map(e => e.textContent)"
# Pixels by which anything at all sticks out of the page to the right.
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / "first", prompts=10),
        write_run(folder / "second", seed=1, synthesis_prompts=7, until="train-tuned"),
    ]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    """Two runs, one unfinished, with measurements of each kind."""
    folder = tmp_path_factory.mktemp("page")
    kinds = {
        "teacher_curve": [
            {"step": n, "yield": 0.9, "influence": n * 1e-3, "student_loss": 3 - n / 10,
             "student_loss_error": 0.1, "influence_quantiles": [-0.2, -0.1, n * 1e-3, 0.1, 0.2],
             "evaluation": {"mt_bench": {"score": 5 + n / 10, "standard_error": 0.2}}}
            for n in range(4)
        ],
        "influence_curve": [
            {"step": n, "share": n / 4, "share_relative": 0.5 + n / 10, "data": "tuned"}
            for n in range(4)
        ],
        "pairs": [{"a": "one", "b": "two", "wins": 6, "losses": 3, "ties": 1}],
        "rows": [
            {"student": "s", "data": "tuned", "evaluation": {"mt_bench": {"score": 5.5}}}
        ],
    }  # fmt: skip
    files = []
    for kind, rows in kinds.items():
        files.append(folder / f"{kind}.json")
        files[-1].write_text(json.dumps({kind: rows}))
    return write_page(runs, folder, files)


def test_it_opens_offline_and_shows_every_section(browser: Browser, page: Path):
    browser.open(page)
    assert browser.errors() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.as_uri()]
    titles = browser.run("return [...document.querySelectorAll('h2')].map(e => e.textContent)")
    assert titles == [
        "Overview", "Results", "Teacher along training", "Comparisons", "Influence", "Samples",
        "Data", "Cost", "Settings and versions",
    ]  # fmt: skip
    drawn = browser.run(
        "return [...document.querySelectorAll('figure svg')].map(e => e.getBBox().width > 100)"
    )
    figures = page.parent / FIGURES
    assert len(drawn) >= 12
    assert all(drawn)
    assert len(list(figures.glob("*.svg"))) == len(list(figures.glob("*.png"))) == len(drawn)


def test_one_file_is_enough(browser: Browser, page: Path, tmp_path: Path):
    alone = tmp_path / NAME
    shutil.copyfile(page, alone)
    browser.open(alone)
    assert browser.errors() == []


def test_the_main_table_sorts_by_number(browser: Browser, page: Path):
    browser.open(page)
    column = (
        "return [...document.querySelectorAll('#results td:nth-child(7)')].map(e => e.textContent)"
    )
    head = browser.driver.find_element(By.CSS_SELECTOR, "#results th:nth-child(7) button")
    head.click()
    ascending = browser.run(column)
    assert ascending == ["2.3000 ± 0.0500", "2.4000 ± 0.0500", "2.5000 ± 0.0500"]
    head.click()
    assert browser.run(column) == ascending[::-1]
    sort = browser.run("return document.querySelector('#results th:nth-child(7)').ariaSort")
    assert sort == "descending"


def test_samples_sort_search_and_page(browser: Browser, page: Path):
    browser.open(page)
    first = "return document.querySelector('#samples-table tbody td').textContent"
    # 40 samples of the first run from -3e-4 to 36e-4, 24 of the second.
    assert browser.run(first) == "+3.60e\u22123"
    browser.driver.find_element(By.CSS_SELECTOR, "[data-key=influence] button").click()
    assert browser.run(first) == "\u22123.00e\u22124"
    sort = "return document.querySelector('[data-key=influence]').ariaSort"
    assert browser.run(sort) == "ascending"
    place = "return document.getElementById('page-place').textContent"
    assert browser.run(place) == "page 1 of 3"
    browser.driver.find_element(By.ID, "page-last").click()
    assert browser.run(place) == "page 3 of 3"
    assert len(browser.run(ROWS)) == 14
    assert not browser.driver.find_element(By.ID, "page-next").is_enabled()
    browser.driver.find_element(By.ID, "samples-search").send_keys("SUNSET")
    wait_for(browser, "16 of 64 samples")
    assert set(browser.run(ROWS)) == {"Describe a sunset."}
    side = browser.driver.find_element(By.ID, "samples-side")
    side.send_keys("harmful")
    # Only the third of each run is a sunset below zero.
    wait_for(browser, "2 of 64 samples")


def wait_for(browser: Browser, count: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    read = "return document.getElementById('samples-count').textContent"
    WebDriverWait(browser.driver, 5).until(lambda _: browser.run(read) == count, browser.run(read))


def test_a_sample_opens_with_its_siblings_and_its_prompt(browser: Browser, page: Path):
    browser.open(page)
    browser.driver.find_element(By.CSS_SELECTOR, ".open").click()
    detail = browser.driver.find_element(By.CSS_SELECTOR, ".detail")
    siblings = detail.find_elements(By.CSS_SELECTOR, ".siblings li")
    assert [one.find_element(By.TAG_NAME, "span").text for one in siblings] == [
        "+3.60e\u22123", "+3.50e\u22123", "+3.40e\u22123", "+3.30e\u22123"
    ]  # fmt: skip
    assert siblings[0].get_attribute("aria-current") == "true"
    detail.find_element(By.TAG_NAME, "summary").click()
    assert "Ask 9." in detail.text


def test_by_keyboard_alone(browser: Browser, page: Path):
    browser.open(page)
    browser.press(Keys.TAB)
    active = "return document.activeElement"
    assert browser.run(active).text == "Skip to the report"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.run(outline) == "solid"
    browser.press(Keys.ENTER)
    assert browser.run(active).get_attribute("id") == "main"
    seen = set()
    for _ in range(60):
        browser.press(Keys.TAB)
        element = browser.run(active)
        seen.add(element.get_attribute("class") or element.get_attribute("id"))
        if element.get_attribute("class") == "open":
            break
    assert {"scroll", "samples-search", "samples-group", "samples-side", "open"} <= seen
    browser.press(Keys.ENTER)
    assert browser.run("return document.activeElement.ariaExpanded") == "true"
    assert browser.driver.find_elements(By.CSS_SELECTOR, ".detail")
    unnamed = browser.run(
        "return [...document.querySelectorAll('button, input, select')]"
        ".filter(e => !e.textContent.trim() && !e.labels?.length).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_sticks_out_of_a_narrow_screen(browser: Browser, page: Path, width: int):
    browser.open(page, width=width)
    browser.driver.find_element(By.CSS_SELECTOR, ".open").click()
    browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.run(OVERFLOW) == 0
    small = browser.run(
        "return Math.min(...[...document.querySelectorAll('main p, td, button')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert small >= 11
    letters = browser.run(
        "return Math.min(...[...document.querySelectorAll('figure svg text')].map(e => {"
        " const {a, b} = e.getScreenCTM();"
        " return parseFloat(getComputedStyle(e).fontSize) * Math.hypot(a, b); }))"
    )
    assert letters >= 8.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_figures_stand_out_in_both_schemes(browser: Browser, page: Path, scheme: str):
    browser.open(page, scheme=scheme)
    # The contrast of WCAG 2.2: 4.5 for text.
    contrasts = browser.run(
        """
        const canvas = document.createElement('canvas').getContext('2d');
        const light = (colour) => {
          canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
          const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => {
            v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        const against = (colour) => {
          const one = light(colour);
          return (Math.max(one, paper) + 0.05) / (Math.min(one, paper) + 0.05);
        };
        const texts = [...document.querySelectorAll('p, td, th, a, .helps, .harms, h2')];
        const letters = [...document.querySelectorAll('figure svg text')];
        return {
          dark: paper < 0.5,
          text: Math.min(...texts.map(e => against(getComputedStyle(e).color))),
          letters: Math.min(...letters.map(e => against(getComputedStyle(e).fill))),
        };
        """
    )
    assert contrasts["dark"] is (scheme == "dark")
    assert contrasts["text"] >= 4.5
    assert contrasts["letters"] >= 4.5


HOSTILE = [
    "</script><script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 2'><style>body { display: none }</style>",
    "<!-- <script>",
    "**bold** [link](javascript:window.hit=3) # heading {{SCRIPT}}",
    "user\u202egnp.exe\u2066 \x1b[31mred\x00\x85 zero\u200bwidth\ufeff\U000e0041",
    "x" * 3000,
    "مرحبا بالعالم 日本語 👩‍👩‍👧",
    "&lt;b&gt; &amp; \"quoted\" 'single' `tick` \u2028 line",
]


def test_texts_of_a_model_do_nothing(browser: Browser, tmp_path: Path):
    name = "<b onclick=alert(1)>\u202erun"
    folder = write_run(tmp_path / name, texts=HOSTILE, response=HOSTILE[0], teacher="</dd><script>")
    page = write_page([folder], tmp_path / "out")
    browser.open(page, width=360)
    for button in browser.driver.find_elements(By.CSS_SELECTOR, ".open")[:8]:
        browser.run("arguments[0].click()", button)
    assert browser.errors() == []
    assert browser.run("return window.hit") is None
    assert browser.run("return document.querySelector('main :is(img, script, b)')") is None
    assert browser.run("return document.title") == f"{name}: Montessori-Instruct report".replace(
        "\u202e", "<U+202E>"
    )
    assert browser.run(OVERFLOW) == 0
    # Every instruction is there letter by letter, hidden characters as their code points.
    shown = set(
        browser.run(
            "return [...document.querySelectorAll('.detail .text:first-of-type')]"
            ".map(e => e.textContent)"
        )
    )
    assert {*HOSTILE[:4], HOSTILE[5], HOSTILE[6]} <= shown
    assert "userU+202Egnp.exeU+2066 U+001B[31mredU+0000U+0085 zeroU+200BwidthU+FEFFU+E0041" in shown
    assert "&lt;b&gt; &amp; \"quoted\" 'single' `tick` U+2028 line" in shown
    marks = browser.run("return document.querySelectorAll('.detail .text .code').length")
    assert marks > 0


def test_a_script_from_elsewhere_would_not_run(browser: Browser, page: Path, tmp_path: Path):
    """The policy is the second wall: even a script that got into the file does nothing."""
    tampered = tmp_path / "tampered.html"
    inserted = "<script>window.hit = 1</script><img src='https://example.invalid/x.png'></main>"
    tampered.write_text(page.read_text().replace("</main>", inserted))
    browser.open(tampered)
    assert browser.run("return window.hit") is None
    assert len([one for one in browser.errors() if "Content Security Policy" in one]) == 2
    assert not [url for url in browser.requests() if url.startswith("http")]


def test_what_is_not_done_is_said(browser: Browser, tmp_path: Path):
    begun = write_run(tmp_path / "begun", until="generate", iterations=2)
    browser.open(write_page([begun], tmp_path))
    assert browser.errors() == []
    text = browser.driver.find_element(By.TAG_NAME, "main").text
    assert "unfinished" in text
    assert "iteration 1: generate is not done" in text
    assert "iteration 2 has not begun" in text
    assert "No student has been evaluated yet." in text
    assert "No sample has a measured influence yet." in text


def test_influence_at_work_is_shown_so_far(browser: Browser, tmp_path: Path):
    folder = write_run(tmp_path / "run", until="influence")
    scores = [{"id": "p00000-1", "influence": 2e-4}, {"id": "p00000-0", "influence": None}]
    journal = [{"journal": "x", "key": {}}, {"chunk": 0, "scores": scores}]
    lines = "".join(json.dumps(one) + "\n" for one in journal) + '{"chunk": 1, "sco'
    (folder / "iteration-1/influence/chunks.jsonl").write_text(lines)
    browser.open(write_page([folder], tmp_path))
    text = browser.driver.find_element(By.TAG_NAME, "main").text
    assert "influence is at work; 2 scores so far" in text
    assert browser.run(ROWS) == ["Name three rivers.", "Write a story about a dog."]


def test_long_names_of_measures_stay_in_their_columns(browser: Browser, tmp_path: Path):
    folder = write_run(tmp_path / "run")
    found = {
        "win_rate": 40.0, "baseline": "runs/paper/tinyllama_1b/self_instruct:2:untuned",
        "annotator": "weighted_alpaca_eval_gpt4_turbo", "length_controlled_win_rate": 45.0,
    }  # fmt: skip
    marker = folder / "iteration-1/evaluate-tuned/done.json"
    marker.write_text(json.dumps({"student": "s", "alpaca_eval": found}))
    browser.open(write_page([folder], tmp_path, parse=False))
    heads = browser.run(
        "return [...document.querySelectorAll('#results thead th')]"
        ".map(e => [e.textContent, e.scrollWidth - e.clientWidth])"
    )
    assert any("weighted_alpaca_eval_gpt4_turbo" in name for name, _ in heads)
    assert [name for name, beyond in heads if beyond > 0] == []


def test_a_run_of_another_method_has_its_own_stages(browser: Browser, tmp_path: Path):
    """Only data, training and evaluation: no influence, no pairs."""
    folder = write_run(tmp_path / "plain", until="split")
    shutil.rmtree(folder / "iteration-1/split")
    shutil.copytree(folder / "iteration-1/generate", folder / "iteration-1/synthesise-teacher")
    shutil.rmtree(folder / "iteration-1/generate")
    stage = folder / "iteration-1/evaluate-teacher"
    stage.mkdir()
    task = {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.0625, "shots": 8}
    result = {"student": "s", "skipped": {}, "lm_harness": {"tasks": {"gsm8k": task}}}
    (stage / "done.json").write_text(json.dumps(result))
    browser.open(write_page([folder], tmp_path))
    assert browser.errors() == []
    text = browser.driver.find_element(By.ID, "results").text
    assert "gsm8k: exact_match (strict; 8-shot)" in text
    assert "0.2500 ± 0.0625" in text


def test_the_command_writes_into_the_run_or_where_it_is_told(
    runs, tmp_path: Path, capsys, monkeypatch
):
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    assert run(["report", str(copy)]) == 0
    assert (copy / NAME).exists()
    assert f"The page: {copy / NAME}" in capsys.readouterr().out
    assert run(["report", str(copy), "--no-page", "--out", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none").exists()
    monkeypatch.chdir(tmp_path)
    assert run(["report", str(copy), str(runs[1])]) == 0
    assert (tmp_path / "report" / NAME).exists()
