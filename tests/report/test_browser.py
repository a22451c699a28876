"""The page in a real browser, opened from disk."""

from __future__ import annotations

import shlex
import shutil
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest

from tests.report.conftest import HOSTILE, NAMES
from tests.report.test_page import edited
from transclip_fast.cli.run import solve_folder
from transclip_fast.estimator import TransCLIP
from transclip_fast.report.page import write_report
from transclip_fast.store.corrections import read_corrections

TOGETHER = "Together (confidence, too sure of itself)"
NAMES_OF_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES_OF_CHROMIUM)), None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="NO BROWSER: no playwright")
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: no chromium")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Open a file; at the end nothing may have been wrong, asked for or run."""

    @contextmanager
    def show(file, **settings):
        context = browser.new_context(accept_downloads=True, **settings)
        page, wrong, asked = context.new_page(), [], []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#table tbody tr")
        yield page
        # Only the file itself, pictures within it, and what it saved.
        others = [url for url in asked if not url.startswith(("data:", "blob:", file.as_uri()))]
        assert (wrong, others) == ([], [])
        context.close()

    return show


@pytest.fixture(scope="module")
def page_file(made_once, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_report(made_once.result, file)
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1300])
def test_it_fits_and_holds_nothing_but_itself(scheme, width, opened, page_file):
    settings = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    with opened(page_file, **settings) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator(".card").first.click()
        assert page.locator("#panel").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = int(colour.split("(")[1].split(",")[0]) > 128
        assert light == (scheme == "light")
        # Pictures are decoded, and neither names nor keys have become elements.
        assert page.evaluate("document.querySelector('.card img').naturalWidth") > 0
        assert page.locator("script").count() == 4
        assert page.locator("img:not([src^='data:image/jpeg;base64,'])").count() == 0
        assert page.locator("section.plots svg").count() == 2
        assert page.locator("details .plots svg").count() == 1


def test_pictures_stand_in_rows_whatever_their_names(opened, page_file):
    with opened(page_file) as page:
        page.evaluate(
            "document.querySelectorAll('.card .name').forEach((name, k) => {"
            "name.textContent = k ? 'short' : 'long '.repeat(9); })"
        )
        places = page.evaluate(
            "[...document.querySelectorAll('.card')].map(card => card.querySelector('.picture')"
            ".getBoundingClientRect()).map(box => [Math.round(box.left), Math.round(box.top)])"
        )
        columns = len({left for left, _ in places})
        assert columns > 1
        assert len({top for _, top in places}) == -(-len(places) // columns)


def test_classes_are_sorted_and_searched(opened, page_file, made_once):
    labels = pq.read_table(made_once.result / "predictions.parquet")["label"].to_pylist()
    sizes = sorted((labels.count(k) for k in range(len(NAMES))), reverse=True)
    with opened(page_file) as page:
        now = "#table tbody td:nth-child(3)"
        assert page.locator(now).all_text_contents() == [*map(str, sizes)]
        page.get_by_role("button", name="now").click()
        assert page.locator(now).all_text_contents() == [*map(str, sizes[::-1])]
        page.get_by_role("button", name="class", exact=True).click()
        shown = page.locator("#table tbody td:first-child").all_text_contents()
        assert sorted(shown) == sorted(NAMES)
        page.fill("#search", "PLAIN")
        assert page.locator("#table tbody td:first-child").all_text_contents() == ["plain"]
        assert page.locator("#listed").text_content() == "1 class."
        page.fill("#search", "nowhere")
        assert page.locator("#table tbody tr").count() == 0


def test_an_image_shows_why_it_has_its_label(opened, page_file, made_once):
    table = pq.read_table(made_once.result / "predictions.parquet").to_pylist()
    with opened(page_file) as page:
        card = page.locator(".card").first
        row = int(card.get_attribute("data-row"))
        card.click()
        panel = page.locator("#panel")
        headings = panel.locator("h3").all_text_contents()
        assert headings == ["The text says", "The mixture says", "Its neighbours say", TOGETHER]
        assert panel.locator(".facts2 bdi").nth(1).text_content() == table[row]["key"]
        first = [say.locator("bdi").first.text_content() for say in panel.locator(".say").all()]
        assert first[0] == table[row]["zero_shot_label_name"]
        assert first[2] == table[row]["label_name"]
        percent = f"{round(100 * table[row]['calibrated_confidence'])} %"
        facts = panel.locator(".facts2 p").all_text_contents()
        assert f"about {percent} likely right" in facts
        assert card.locator(".was").text_content().split(",")[0] == percent
        legend = page.locator("#legend").text_content()
        assert "its label, about how likely that is right, in percent" in legend
        near = panel.locator(".near bdi").all_text_contents()
        assert near[:3] == [table[other]["label_name"] for other in table[row]["neighbors"]]
        assert panel.locator(".near img").count() == len(near)


def correct(page, texts):
    """Correct the first images by keyboard alone; their rows."""
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    rows = []
    for text in texts:
        rows.append(int(page.locator('.card[aria-current="true"]').get_attribute("data-row")))
        page.keyboard.type(text)
        page.keyboard.press("Enter")
    return rows


def saved(page, folder):
    """The corrections that the page saves."""
    with page.expect_download() as waiting:
        page.click("#save")
    file = folder / waiting.value.suggested_filename
    waiting.value.save_as(file)
    return file


def test_images_are_corrected_and_solved_again(opened, made, cli_in_process, tmp_path, monkeypatch):
    """With the command that the page shows, where its corrections are."""
    write_report(made.result, tmp_path / "page.html")
    with opened(tmp_path / "page.html") as page:
        rows = correct(page, ["pla", "=cmd", "line"])
        page.keyboard.press("Enter")  # the fourth has its class already
        assert page.locator("#count").text_content() == "4 corrections"
        page.keyboard.press("Escape")
        page.keyboard.press("u")
        assert page.locator("#count").text_content() == "3 corrections"
        card = page.locator(f'.card[data-row="{rows[0]}"] .was').first
        assert "%" not in card.text_content()  # the confidence was of the other label
        file = saved(page, tmp_path)
        command = page.locator("#command").text_content()
        look = page.locator("#look").text_content()
    assert file.name == "corrections.csv"
    assert not any(line.startswith(("=", "+", "-", "@")) for line in file.read_text().split('"'))
    expected = dict(zip(rows, (NAMES.index("plain"), 2, NAMES.index("line\nbreak")), strict=True))
    assert read_corrections(file, made.keys, NAMES, len(made.keys)) == expected

    monkeypatch.chdir(tmp_path)
    cli_in_process(*shlex.split(command)[1:])
    out = made.folder / "result-corrected"
    table = pq.read_table(out / "predictions.parquet").to_pylist()
    assert {row: table[row]["label"] for row in rows} == expected
    assert [row for row, line in enumerate(table) if line["known"]] == sorted(rows)

    after = tmp_path / "corrected.html"
    cli_in_process(*shlex.split(look)[1:])
    with opened(after) as page:
        tab = page.get_by_role("tab", name="Corrected")
        assert tab.text_content() == "Corrected3"
        cards = page.locator(".card")
        assert sorted(int(card.get_attribute("data-row")) for card in cards.all()) == sorted(rows)
    monkeypatch.setattr("transclip_fast.report.gallery.MOVED", 2)
    write_report(out, after, before=str(made.result))
    with opened(after) as page:
        assert page.get_by_role("tab", name="Corrected").text_content() == "Corrected2 of 3"


def test_a_sample_says_of_how_many(opened, made, tmp_path, monkeypatch):
    """Of all changes, also those of a flow that is not shown."""
    monkeypatch.setattr("transclip_fast.report.gallery.CHANGED", 4)
    n, file = len(made.keys), tmp_path / "page.html"
    edited(made.result, label=[0] * 4 + [1] * 3 + [2] * (n - 7), zero_shot_label=[2] * n)
    write_report(made.result, file)
    with opened(file) as page:
        tab = page.get_by_role("tab", name="Changed labels")
        assert tab.text_content() == "Changed labels4 of 7"
        assert page.get_by_role("tab", name="Least certain").text_content() == f"Least certain{n}"


def test_every_hostile_key_is_saved_and_read_back(opened, page_file, made_once, tmp_path):
    """The least certain images are all images here: each is confirmed."""
    with opened(page_file) as page:
        page.get_by_role("tab", name="Least certain").click()
        given = set()
        for card in page.locator(".card").all():
            card.click()
            page.keyboard.press("Enter")
            given.add(int(card.get_attribute("data-row")))
        file = saved(page, tmp_path)
    keys = made_once.keys
    assert {keys[row] for row in given} == {*keys} > {*HOSTILE}
    found = read_corrections(file, keys, NAMES, len(keys))
    labels = pq.read_table(made_once.result / "predictions.parquet")["label"].to_pylist()
    assert found == {row: labels[row] for row in given}


def test_undo_is_seen_where_the_image_is_not_in_the_gallery(opened, made, tmp_path):
    n, file = len(made.keys), tmp_path / "page.html"
    edited(made.result, label=[0] * 4 + [2] * (n - 4), zero_shot_label=[2] * n)
    write_report(made.result, file)
    with opened(file) as page:
        page.get_by_role("tab", name="Least certain").click()
        card = page.locator(f'.card[data-row="{n - 1}"]')
        card.click()
        page.keyboard.type("plain")
        page.keyboard.press("Enter")
        card.click()
        page.get_by_role("tab", name="Changed labels").click()
        assert card.count() == 0
        panel = page.locator("#panel .facts2")
        assert "you corrected" in panel.text_content()
        page.click("#undo")
        assert "you corrected" not in panel.text_content()
        assert panel.locator("bdi").first.text_content() == NAMES[2]


def test_only_all_is_100_percent(opened, page_file):
    with opened(page_file) as page:
        shown = page.evaluate("[1, 0.99996, 0.9961, 0, null].map(percent)")
        assert shown == ["100 %", "99.9 %", "99.6 %", "0.0 %", ""]
        assert page.evaluate("[1, 0.999, 0.5].map(share)") == ["100 %", "99 %", "50 %"]


def test_unsaved_corrections_are_asked_for(opened, page_file, tmp_path):
    with opened(page_file) as page:
        asks = (
            "() => { const event = new Event('beforeunload', { cancelable: true });"
            "window.dispatchEvent(event); return event.defaultPrevented; }"
        )
        assert not page.evaluate(asks)
        correct(page, ["plain"])
        assert page.evaluate(asks)
        saved(page, tmp_path)
        assert not page.evaluate(asks)


def test_corrections_outlast_the_page(opened, made, tmp_path):
    """Those that are saved, and others but those undone; another result has none."""
    for name in ("page.html", "again.html"):
        write_report(made.result, tmp_path / name)
    solve_folder(made.folder, TransCLIP(device="cpu", likelihood_weight=9.0))
    write_report(made.result, tmp_path / "other.html")
    with opened(tmp_path / "page.html") as first:

        def page(name):
            """As after a reload, which would ask whether unsaved corrections may go."""
            found = first.context.new_page()
            found.goto((tmp_path / name).as_uri())
            found.wait_for_selector("#table tbody tr")
            return found

        rows = correct(first, ["pla", "=cmd", "line"])
        then = page("again.html")
        assert then.locator("#count").text_content() == "3 corrections"
        marked = then.locator(".card:has(.given)").all()
        assert sorted(int(card.get_attribute("data-row")) for card in marked) == sorted(rows)
        assert not page("other.html").locator("#bar").is_visible()
        then.click("#undo")
        then = page("page.html")
        assert then.locator("#count").text_content() == "2 corrections"
        found = read_corrections(saved(then, tmp_path), made.keys, NAMES, len(made.keys))
        assert [*found] == rows[:2]
        then.click("#undo")
        then.click("#undo")
        assert not page("page.html").locator("#bar").is_visible()
        first.evaluate("state.saved = true")


@pytest.mark.parametrize(
    "kept",
    [
        *("{", "null", "[]", '{"given": 3}', '{"given": [3, null]}', '"<script>alert(4)</script>"'),
        '{"given": [["__proto__", 1], ["toString", 1], [1000, 1], [-1, 0], [1.5, 0], [0, 99]]}',
        '{"given": [["<img src=x onerror=alert(5)>", "<b>"], [0, "1"], [0, {}]], "saved": "x"}',
    ],
)
def test_what_others_left_in_the_browser_is_no_correction(kept, opened, page_file):
    with opened(page_file) as page:
        page.evaluate("text => localStorage.setItem(KEPT, text)", kept)
        page.reload()
        page.wait_for_selector("#table tbody tr")
        assert not page.locator("#bar").is_visible()
        assert page.locator(".given").count() == 0
        correct(page, ["plain"])
        assert page.locator("#count").text_content() == "1 correction"


def test_images_that_are_gone_have_their_keys(opened, made, tmp_path):
    """The metadata names images of another folder, which is no longer there."""
    shutil.rmtree(made.folder / "features/img_emb")
    summary = write_report(made.result, tmp_path / "report.html")
    assert summary["thumbnails"] == 0
    with opened(tmp_path / "report.html") as page:
        assert page.locator(".card img").count() == 0
        shown = page.locator(".card .picture bdi").all_text_contents()
        assert set(shown) <= set(made.keys)
        page.locator(".card").first.click()
        assert page.locator("#panel h3").all_text_contents()[0] == "The text says"
        assert "is not shown" in page.locator("#happened").text_content()
