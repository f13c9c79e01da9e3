"""Opens a report in headless Chromium as a reader would, and says what is wrong with it."""

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Findings", "check_report", "missing_browser"]

_CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
_DRIVER = ("/usr/bin/chromedriver", "/usr/lib/chromium/chromedriver", "/usr/bin/chromium-driver")
_QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@dataclass
class Findings:
    """What was seen: `problems` is empty for a good report; the rest are counts, so that an empty page does not pass as good."""

    problems: list[str] = field(default_factory=list)
    images: int = 0
    sections: int = 0
    requests: list[str] = field(default_factory=list)


def missing_browser():
    """Why the check cannot run here, or ''."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    if not _first(_CHROMIUM):
        return "no Chromium on this machine (Debian: apt install chromium chromium-driver)"
    return "" if _first(_DRIVER) else "no chromedriver on this machine (Debian: apt install chromium-driver)"


def check_report(path, *, widths=(1280, 400), screenshots=None):
    """Open `path` at each width -> Findings; `screenshots`, a folder, receives one full-page PNG a width.

    Checked: no console message of level warning or above; every image decoded and described; only file: and data: requested;
    the body no wider than the window (what is wide scrolls in its own box); headings in order; every link of the contents lands.
    """
    found = Findings()
    profile = tempfile.mkdtemp(prefix="report-check-")
    driver = _start(profile)
    try:
        for width in widths:
            # the window of a desktop browser cannot be 400 px wide: the metrics of a narrow device are emulated
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            driver.get(Path(path).resolve().as_uri())
            seen = driver.execute_script(_LOOK)
            found.images, found.sections = seen["images"], seen["sections"]
            found.problems += [f"{width} px: {problem}" for problem in seen["problems"]]
            if screenshots is not None:
                _screenshot(driver, metrics, Path(screenshots) / f"report-{width}.png", seen["height"])
        found.problems += [f"console: {entry['message']}" for entry in driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
        found.requests = _requests(driver)
        found.problems += [f"request: {url}" for url in found.requests if not url.startswith(("file:", "data:"))]
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)
    return found


_LOOK = """
const problems = [];
const images = [...document.images];
for (const image of images) {
  if (!image.complete || image.naturalWidth === 0) problems.push('image not loaded: ' + image.alt);
  if (!image.alt.trim()) problems.push('image without alt');
  if (image.getBoundingClientRect().width < 50) problems.push('image too narrow: ' + image.alt);
}
const wide = document.documentElement.scrollWidth;
if (wide > window.innerWidth) {
  const culprit = [...document.body.querySelectorAll('*')].find(e => e.getBoundingClientRect().right > window.innerWidth + 1
    && !e.closest('.scroll, .frame, nav, pre'));
  const what = culprit ? ': ' + culprit.outerHTML.slice(0, 120) : '';
  problems.push('page is ' + wide + ' px wide in a window of ' + window.innerWidth + what);
}
let last = 0;
for (const heading of document.querySelectorAll('h1, h2, h3, h4')) {
  const level = Number(heading.tagName[1]);
  if (level > last + 1) problems.push('heading skips a level: ' + heading.textContent);
  last = level;
}
if (document.querySelectorAll('h1').length !== 1) problems.push('not exactly one h1');
if (!document.documentElement.lang) problems.push('no lang');
for (const link of document.querySelectorAll('nav a')) {
  if (!document.getElementById(decodeURIComponent(link.hash.slice(1)))) problems.push('contents link lands nowhere: ' + link.hash);
}
if (document.querySelectorAll('script').length) problems.push('the page holds a script');
return {problems, images: images.length, sections: document.querySelectorAll('main > section').length,
        height: document.documentElement.scrollHeight};
"""


def _first(paths):
    return next((p for p in paths if Path(p).exists()), None)


def _start(profile):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = _first(_CHROMIUM)
    for flag in (*_QUIET, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(_first(_DRIVER)))


def _requests(driver):
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url[:80] for url in sent if not url.startswith(("chrome:", "about:"))]  # a data URI can be megabytes long


def _screenshot(driver, metrics, path, height):
    path.parent.mkdir(parents=True, exist_ok=True)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**metrics, "height": min(int(height), 16000)})
    driver.get_screenshot_as_file(str(path))
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
