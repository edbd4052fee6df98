"""The page's live pictures, in a real headless browser where there is one (Debian: chromium and chromium-driver)."""

import json
import re
import shutil

import numpy as np
import pytest

from moepress.report import interactive, reading, style
from test_report import Results

HOSTILE = "</script><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    made = Results(tmp_path_factory.mktemp("live"))
    runs = [made.run("16bit"), made.run("gptq-2", 0.2), made.run("gptq-3", 0.1)]
    runs += [made.run("qesc-pmq-2.5", 0.15), made.run("qesc-3-pesf-0.3", 0.3)]
    runs += [made.run("rtn-2", 0.4, title=f"rtn-2 {HOSTILE}")]
    return made, reading.load(runs, made.root), made.report(runs)


def test_points_and_cells(page):
    _, runs, _ = page
    points = interactive.points(runs).set_index("title")
    assert points.loc["GPTQ, 2 bits", "ppl"] == pytest.approx(
        np.exp(runs[1].metrics["domains"]["prose"]["nll"] / 2 + runs[1].metrics["domains"]["code"]["nll"] / 2)
    )
    assert points.loc["GPTQ, 2 bits", "change"].startswith("+22.") and points.loc["QESC + PESF 0.3, 3 bits", "experts"] < 2
    maps = interactive.maps(runs)
    assert next(iter(maps)) == "bits: QESC + PMQ, 2.5 bits"
    own, used = maps["selections (%): code"], 100 * np.array(runs[0].metrics["domains"]["code"]["expert_use"])
    assert own["value"].tolist() == pytest.approx(used.ravel(), rel=1e-6)
    assert own["layer"] == ["0"] * 4 + ["1"] * 4 and own["expert"].tolist() == [0, 1, 2, 3] * 2


def test_a_large_models_maps_stay_small(tmp_path):
    """One map for each method, not for each seed, and no title in every cell."""
    made = Results(tmp_path, layers=40, experts=128)
    names = [("16bit", 0), *(("qesc-pmq-2.5", seed) for seed in range(3))]
    runs = reading.load([made.run(name, seed=seed, title=f"{name} seed={seed}") for name, seed in names], tmp_path)
    assert list(interactive.maps(runs)) == ["bits: QESC + PMQ, 2.5 bits", *(f"selections (%): {each}" for each in made.domains)]
    assert len(interactive.draw(runs).data) < 4 * 40 * 128 * 25, "bytes for a cell"


def test_looks_are_those_of_the_still_figures(page):
    """A marker of its own for each of matplotlib's, dashes in pixels, the widths' colours, and numbers in the cells."""
    shapes = [marker for marker, _ in [*style.ALLOCATION_STYLES.values(), *style.OTHER_STYLES]] + list(style.PRUNED_MARKERS)
    assert set(shapes) == set(interactive.MARKERS) and len(set(interactive.MARKERS.values())) == len(interactive.MARKERS)
    assert interactive.dashes("-") == "solid" and interactive.dashes((0, (4, 1.5, 1, 0.2))) == [8, 3, 2, 1]
    assert interactive.on_both("#0072b2") == "#0072b2" and interactive.on_both("#000000") == "#666666"
    _, runs, _ = page
    text = interactive.draw(runs).data
    assert all(f'"{interactive.MARKERS[marker]}"' in text for marker in ("D", "P")) and "HSpan" in text
    title, bits = next(iter(interactive.maps(runs).items()))
    assert bits["words"] == [str(width) for layer in runs[3].bits for width in layer]
    assert {ink for ink, value in zip(bits["ink"], bits["value"], strict=True) if value > 2} == {"white"}
    look = interactive.palette(title, bits["value"])
    assert look == {"palette": [interactive.BIT_COLOURS[2], interactive.BIT_COLOURS[3]], "low": 1.5, "high": 3.5}
    level = interactive.levels(runs).iloc[0]
    nll = [runs[0].metrics["domains"][name]["nll"] for name in ("prose", "code")]
    assert level["ppl"] == pytest.approx(np.exp(np.mean(nll))) and level["accuracy"] == pytest.approx(80)
    assert level["shift"] == 0


def test_data_is_never_script(page):
    *_, out = page
    html = (out / "index.html").read_text()
    assert HOSTILE not in html and "document.title='owned'" in html
    (data,) = re.findall(r'<script type="application/json" id="live-data">(.*?)</script>', html)
    assert set(json.loads(data)[1][0]["roots"].values()) == {"live-quality", "live-experts"}


@pytest.mark.skipif(not (shutil.which("chromedriver") and shutil.which("chromium")), reason="no chromium and chromedriver here")
@pytest.mark.parametrize("size", [(1250, 900), (390, 844)])
def test_in_a_browser(page, size):
    """Both are drawn without an error, without network; the choices change what is shown; they fit a phone."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    _, runs, out = page
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--window-size={size}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get((out / "index.html").as_uri())
        WebDriverWait(browser, 30).until(
            lambda b: b.execute_script("return window.Bokeh && Bokeh.documents.length == 1 && Bokeh.documents[0].is_idle")
        )
        assert browser.title != "owned"
        find = "const all = [...Bokeh.documents[0]._all_models.values()]; "
        score = find + "return all.find(model => model.type == 'Scatter').y.field"
        choose = find + "all.find(m => m.type == 'Select' && m.name == arguments[0]).value = arguments[1]"
        assert browser.execute_script(score) == "ppl"
        browser.execute_script(choose, "score", "perplexity, out of domain")
        assert browser.execute_script(score) == "ppl_ood"
        assert browser.execute_script(find + "return all.find(model => model.type == 'HSpan').y.field") == "ppl_ood"
        interval = find + "return all.find(model => model.type == 'BasicTicker' && model.min_interval == 1) != undefined"
        assert browser.execute_script(interval), "whole widths"
        browser.execute_script(choose, "map", "selections (%): code")
        source = "all.find(m => m.type == 'ColumnDataSource' && m.columns().includes('expert'))"
        values = browser.execute_script(find + f"return Array.from({source}.get_column('value'))")
        used = 100 * np.array(runs[0].metrics["domains"]["code"]["expert_use"])
        assert values == pytest.approx(used.ravel(), rel=1e-6)
        assert browser.execute_script(find + "return all.find(m => m.type == 'LinearColorMapper').palette.length") == 256
        drawn = "return [...document.querySelectorAll('.live')].map(e => e.firstElementChild.getBoundingClientRect().width)"
        widths = browser.execute_script(drawn)
        assert len(widths) == 2 and all(200 < each < width for each in widths)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors, errors
    finally:
        browser.quit()
