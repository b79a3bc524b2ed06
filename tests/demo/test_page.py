"""The page is served and asked through Gradio's client and a real browser, where they are installed."""

import json
import os
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from browser import PATIENCE, chromium
from code_blocks import block_of
from folders import image_folder, text_folder
from PIL import Image

import pyglobenc
from pyglobenc.demo.models import Models

pytestmark = pytest.mark.slow

MARKUP = "the <b>good</b> film <img src=x onerror=alert(1)> ${alert(2)} {{film}}"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a public page with a text and an image model, and the folder of its files."""
    # Gradio takes seconds to import, so a run without these tests does not import it.
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'pyglobenc[demo]'")
    from pyglobenc.demo.page import LAUNCH, build

    folder = tmp_path_factory.mktemp("served")
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "files")
    models = Models(
        [text_folder(folder / "text")], [image_folder(folder / "image", "<b>cat</b>", "dog")], True, "cpu"
    )
    page = build(models, max_characters=300, max_pixels=1_000_000)
    try:
        _, url, _ = page.launch(**LAUNCH, prevent_thread_lock=True)
        yield url, models
        page.close(verbose=False)
        left = [path for path in (folder / "files").rglob("*") if path.name.startswith("attribution")]
        assert not left, "downloads are deleted with the page"
    finally:
        page.close(verbose=False)
        os.environ.pop("GRADIO_TEMP_DIR")
        if before is not None:
            os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    from gradio_client import Client

    return Client(served[0], verbose=False, download_files=str(tmp_path_factory.mktemp("client")))


def asked(models, text="the good film", pair="", methods=("globenc",), token="", label="", words=True):
    return [models.texts[0], text, pair, list(methods), token, label, words]


def tokens_of(html):
    """The coloured tokens of the first text of a page."""
    text = re.search(r'<p class="text".*?</p>', html, re.S).group()
    return re.findall(r"<span[^>]*>(.*?)</span>", text)


def test_downloads_are_the_attribution(served, client):
    models = served[1]
    html, *files = client.predict(*asked(models, methods=("globenc", "saliency")), api_name="/explain")
    assert tokens_of(html) == ["[CLS]", "the", "good", "film", "[SEP]"] and html.count("<section>") == 2
    page, png, saved = (Path(one["value"] if isinstance(one, dict) else one) for one in files)
    assert page.read_text().startswith("<!DOCTYPE html>") and png.read_bytes().startswith(b"\x89PNG")
    assert [one.method for one in pyglobenc.load(saved)] == ["globenc", "saliency"]
    kept = Path(os.environ["GRADIO_TEMP_DIR"]).rglob("attribution.*")
    assert sorted(path.suffix for path in kept) == [".html", ".json", ".png"], "the server keeps one copy"


def test_the_documentations_client(served):
    code = block_of("integrations.md", "gradio_client")
    for example, here in (("http://127.0.0.1:7860/", served[0]), ("minilm-sst2", served[1].texts[0])):
        assert example in code
        code = code.replace(example, here)
    given = dict(pyglobenc=pyglobenc)
    exec(compile(code, "integrations.md", "exec"), given)
    assert [one.method for one in given["attributions"]] == ["globenc", "saliency"]
    assert given["attributions"][0].text == "A deep and meaningful film."


def test_users_at_the_same_time_get_their_own_texts(served, client):
    texts = [" ".join(["good"] * count) for count in range(1, 9)]
    with ThreadPoolExecutor(len(texts)) as pool:
        found = list(
            pool.map(lambda text: client.predict(*asked(served[1], text), api_name="/explain")[0], texts)
        )
    assert [len(tokens_of(html)) - 2 for html in found] == list(range(1, 9))


@pytest.mark.parametrize("model", ["minilm", "/etc", "bert-base-uncased"])
@pytest.mark.parametrize("ask", ["/explain", "/measure"])
def test_a_public_page_refuses_other_models_of_its_clients(served, client, model, ask):
    with pytest.raises(Exception, match="not in the list of choices|the model must be one of"):
        client.predict(model, *asked(served[1])[1:], api_name=ask)


def answer(url, name, *data):
    """What the server tells a program that doesn't use Gradio's client."""
    body = json.dumps({"data": list(data)}).encode()
    request = urllib.request.Request(
        f"{url}gradio_api/call/{name}", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/{name}/{event}") as reply:
        return reply.read().decode()


def test_a_client_gets_no_file_of_the_server(served):
    url, models = served
    photo = Path(models.images[0]) / "photo.png"
    Image.radial_gradient("L").save(photo)
    for path in (str(photo), "/etc/hostname"):
        file = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
        assert "event: error" in answer(url, "preview", file)
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}gradio_api/file={path}")


def test_no_request_passes_by_the_queue(served):
    url, models = served
    assert "event: complete" in answer(url, "explain", *asked(models))
    body = json.dumps({"data": asked(models)}).encode()
    request = urllib.request.Request(
        f"{url}gradio_api/run/explain", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request)


def test_errors_of_clients_are_messages(served, client):
    for changes, message in (
        (dict(text="a" * 301), "at most 300 characters"),
        (dict(token="<b>"), "&lt;b&gt;"),
        (dict(label="&" * 5000, methods=["saliency"]), "^.{,3000}$"),
        (dict(methods=["globenc"] * 5), "1 to 4 methods|4"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(*asked(served[1], **changes), api_name="/explain")


@pytest.fixture(scope="module")
def driver(served, tmp_path_factory):
    with chromium(str(tmp_path_factory.mktemp("downloads"))) as driver:
        driver.get(served[0])
        yield driver


def wait(driver, found):
    """Wait until a function of the driver returns something true, and return it."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, PATIENCE, 0.05, [StaleElementReferenceException]).until(found)


def element(driver, selector):
    return wait(driver, lambda driver: driver.find_element("css selector", selector))


def shown_text(driver, text):
    """Wait until this text is shown in colours."""
    wait(driver, lambda driver: [one.text for one in driver.find_elements("css selector", "#shown .text")] and
         driver.find_element("css selector", "#shown .text").text == text)  # fmt: skip


def keep(driver, name):
    """Keep a picture of the page for the documentation if a folder for these is named."""
    folder = os.environ.get("PYGLOBENC_SCREENSHOTS")
    if folder:
        time.sleep(1)
        driver.save_screenshot(str(Path(folder) / name))


def write(driver, selector, text):
    from selenium.webdriver.common.keys import Keys

    box = element(driver, selector)
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE)
    box.send_keys(text)
    return box


def test_a_sentence_in_the_browser(driver):
    write(driver, "#text textarea", "The good film.")
    element(driver, "#explain").click()
    shown_text(driver, "[CLS] The good film. [SEP]")
    spans = driver.find_elements("css selector", "#shown .text span")
    assert [span.text for span in spans] == ["[CLS]", "The", "good", "film", ".", "[SEP]"]
    assert len({span.value_of_css_property("background-color") for span in spans}) > 2
    assert driver.find_element("css selector", "#shown table b").is_displayed(), "the bars"
    keep(driver, "demo_text.png")


def test_methods_side_by_side_in_the_browser(driver):
    from selenium.webdriver.common.keys import Keys

    box = element(driver, "#methods input")
    box.click()
    box.send_keys("attention-rollout")
    box.send_keys(Keys.ENTER)
    box.send_keys(Keys.ESCAPE)
    element(driver, "#explain").click()
    wait(driver, lambda driver: len(driver.find_elements("css selector", "#shown section")) == 2)
    left, right = driver.find_elements("css selector", "#shown section")
    assert "globenc" in left.text and "attention-rollout" in right.text
    assert left.location["y"] == right.location["y"] and left.location["x"] < right.location["x"]
    keep(driver, "demo_methods.png")


def test_markup_in_a_text_stays_text_in_the_browser(driver):
    write(driver, "#text textarea", MARKUP)
    element(driver, "#explain").click()
    shown_text(driver, f"[CLS] {MARKUP} [SEP]")
    assert not driver.find_elements("css selector", "#shown .text b, #shown img, #shown script")
    # A dialog of a script would raise an error here.
    assert driver.title == "pyglobenc"


def test_an_error_in_the_browser_is_a_message(driver):
    write(driver, "#token input, #token textarea", "99")
    element(driver, "#explain").click()
    toast = wait(driver, lambda driver: driver.find_element("css selector", ".toast-body").text)
    assert "target must lie in" in toast
    keep(driver, "demo_error.png")
    write(driver, "#token input, #token textarea", "<b>x</b>")
    element(driver, "#explain").click()
    wait(driver, lambda driver: "<b>x</b>" in element(driver, ".toast-wrap").text)
    assert not driver.find_elements("css selector", ".toast-body b b")
    write(driver, "#token input, #token textarea", "")


def test_layers_and_faithfulness_in_the_browser(driver):
    write(driver, "#text textarea", "The good film.")
    for accordion in driver.find_elements("css selector", "button.label-wrap"):
        accordion.click()
    element(driver, "#look").click()
    pictures = wait(driver, lambda driver: driver.find_elements("css selector", "#layers img"))
    assert len(pictures) == 2
    wait(driver, lambda driver: all(one.get_property("naturalWidth") > 300 for one in pictures))
    assert "layer" in element(driver, "#layers dl").text
    element(driver, "#measure").click()
    wait(driver, lambda driver: "comprehensiveness" in element(driver, "#faithfulness").text)
    keep(driver, "demo_layers.png")


def test_an_image_in_the_browser(driver, tmp_path):
    picture, script = tmp_path / "photo.png", tmp_path / "<b>script.png"
    Image.radial_gradient("L").convert("RGB").save(picture)
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    next(one for one in driver.find_elements("css selector", "[role=tab]") if one.text == "Image").click()
    element(driver, "#upload input[type=file]").send_keys(str(picture))
    wait(driver, lambda driver: element(driver, "#preview img").get_property("naturalWidth") == 256)
    write(driver, "#classes input, #classes textarea", "0, dog")
    element(driver, "#explain-image").click()
    shown = element(driver, "#shown-image img")
    wait(driver, lambda driver: shown.get_property("naturalWidth") > 800)
    assert shown.get_attribute("alt").startswith("<b>cat</b> (") and "dog (" in shown.get_attribute("alt")
    keep(driver, "demo_image.png")
    element(driver, "#upload [aria-label='Remove this file'], #upload [aria-label='Clear']").click()
    element(driver, "#upload input[type=file]").send_keys(str(script))
    wait(driver, lambda driver: "it is none of BMP" in element(driver, ".toast-wrap").text)
    assert not driver.find_elements("css selector", ".toast-body b > b")


def test_the_browser_asks_no_other_server(driver, served):
    logged = [entry["message"] for entry in driver.get_log("browser")]
    wrong = [line for line in logged if re.search(r"https?://(?!127\.0\.0\.1|localhost)", line)]
    assert not wrong, json.dumps(wrong, indent=1)
    loaded = driver.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert not [name for name in loaded if name.startswith("http") and not name.startswith(served[0])]
