"""A headless Chromium, to try pages as a person does."""

import base64
import shutil

import pytest

BINARY, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """Opens a page at a time.

    Attributes:
      driver: Selenium's.
    """

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, width=1280, height=900, scheme="light"):
        """Opens a file as on a screen of this size, with "light" or "dark" preferred."""
        self.open_address(f"file://{path}", width, height, scheme)

    def open_address(self, address, width=1280, height=900, scheme="light"):
        """As `open`, of an address."""
        self.set_screen(width, height, scheme)
        self.driver.get(address)

    def set_screen(self, width, height, scheme):
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)

    def run(self, script, *arguments):
        """What the body of a function returns in the page."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition, seconds=20):
        """Waits until an expression is true in the page."""
        from selenium.webdriver.support.ui import WebDriverWait

        message = f"not true in {seconds} s: {condition}"
        return WebDriverWait(self.driver, seconds, 0.05).until(
            lambda driver: driver.execute_script(f"return {condition}"), message
        )

    def errors(self):
        """What the page has written to the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def overflow(self):
        """Pixels by which the page is wider than the screen."""
        return self.run("return document.documentElement.scrollWidth - innerWidth")

    def screenshot(self, path):
        """Writes the whole page as PNG."""
        size = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)
        path.write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="session")
def browser():
    if not BINARY or not DRIVER:
        pytest.skip("needs chromium and chromedriver (Debian: chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BINARY
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield Browser(driver)
    driver.quit()
