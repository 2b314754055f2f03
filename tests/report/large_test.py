"""A run of 100,000 samples: the page stays small and opens at once."""

import time
from pathlib import Path

from selenium.webdriver.common.by import By

from montessori_jax.report.page import write_page
from montessori_jax.report.run_data import read_run
from montessori_jax.report.samples import LARGEST, MOST, collect
from tests.report.browser import Browser
from tests.report.run_folder import write_run

PROMPTS, EACH = 12_500, 8
LIMIT_SECONDS, LIMIT_BYTES = 3.0, 30_000_000


def test_it_opens_in_three_seconds_and_says_what_it_leaves_out(browser: Browser, tmp_path: Path):
    tasks = [f"Write about subject {n}: " + "a sentence of some length, " * 8 for n in range(97)]
    folder = write_run(
        tmp_path / "large", texts=tasks, prompts=PROMPTS, each=EACH, response="word " * 300,
        until="preferences",
    )  # fmt: skip
    page = write_page([folder], tmp_path)
    assert page.stat().st_size < LIMIT_BYTES
    begun = time.perf_counter()
    browser.open(page)  # returns when the script has set the page up
    browser.driver.find_element(By.CSS_SELECTOR, "[data-key=rank] button").click()
    assert browser.driver.find_elements(By.CSS_SELECTOR, "#samples-table .open")
    assert time.perf_counter() - begun < LIMIT_SECONDS
    assert browser.errors() == []
    remark = browser.driver.find_element(By.ID, "samples-note").text
    assert "of 100,000 probed samples (whole prompts: those of the most helpful" in remark
    # Influence grows with the place: the best is the last, the worst the first.
    first = "return document.querySelector('#samples-table tbody td').textContent"
    assert browser.run(first) == "+1.00e+1"
    browser.driver.find_element(By.CSS_SELECTOR, "[data-key=influence] button").click()
    browser.driver.find_element(By.CSS_SELECTOR, "[data-key=influence] button").click()
    assert browser.run(first) == "\u22123.00e\u22124"


def test_long_texts_take_the_place_of_many(tmp_path: Path):
    """48 MB of answers: fewer prompts are shown, each with all of its candidates."""
    folder = write_run(
        tmp_path / "wide", prompts=500, each=8, response="日" * 5000, until="preferences"
    )
    data = collect([read_run(folder, "wide")])
    assert len(data["samples"]) < MOST
    assert len(data["samples"]) == 8 * len(data["prompts"]) == data["groups"][0]["shown"]
    assert sum(len(sample[5].encode()) for sample in data["samples"]) < LARGEST
