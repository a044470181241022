"""A real JupyterLab in a real browser, on a project of its own that goes when it is done."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
NO_NEWS = '{"fetchNews": "false", "checkForUpdates": false}'  # else JupyterLab asks on every first start
PATIENCE_MS = 90_000
HANDLE = ".cspine-explorer .noUi-handle"
SLIDERS = """
from cspine_helpers.slider.widget import ThresholdExplorer
print(*{one.widget.model_id for one in globals().values() if isinstance(one, ThresholdExplorer)})
"""
FIND = """async (models) => {  // the slider's cell, scrolled to, and the widget that it shows
    const notebook = jupyterapp.shell.currentWidget.content;
    const shown = notebook.widgets.map(cell => JSON.stringify(cell.model.toJSON().outputs || []));
    const place = shown.findIndex(outputs => models.some(model => outputs.includes(model)));
    if (place < 0) return "";
    notebook.activeCellIndex = place;
    await notebook.scrollToItem(place, "start");
    return models.find(model => shown[place].includes(model));
}"""
FAILED = """() => jupyterapp.shell.currentWidget.content.model.toJSON().cells
    .flatMap(cell => cell.outputs || []).filter(output => output.output_type === "error")
    .map(output => `${output.ename}: ${output.evalue}`)"""
ASK = """async (code) => {  // what the kernel prints when it runs this code
    const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const future = kernel.requestExecute({code, store_history: false});
    let text = "";
    future.onIOPub = ({content}) => { text += content.text || (content.traceback || []).join("\\n"); };
    await future.done;
    return text;
}"""


def chromium() -> str:
    """Where the browser is.

    Raises:
        FileNotFoundError: there is none.
    """
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError(
            "No Chromium was found. Install it (Debian: apt-get install chromium), or set CHROMIUM to "
            "its path."
        )
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    path = chromium()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield running
        finally:
            running.close()


def copy_project(folder: Path) -> None:
    """The notebooks and the built-in run as a project of its own, with a link to the data."""
    ignored = shutil.ignore_patterns("rendered", "*.py", ".*", "__pycache__")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=ignored)
    (folder / "data").symlink_to(ROOT / "data")
    shutil.copytree(ROOT / "checkpoints" / "builtin", folder / "checkpoints" / "builtin")


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """JupyterLab on the notebooks of a copied project; gives the address of notebook 04.

    Raises:
        RuntimeError: it does not start; says what it wrote.
    """
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(NO_NEWS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0,
        "ServerApp.root_dir": folder / "notebooks", "IdentityProvider.token": (token := secrets.token_hex()),
        "LabApp.user_settings_dir": settings.parents[1], "LabApp.workspaces_dir": folder / "workspaces",
        "LabApp.expose_app_in_browser": True, "LabApp.extension_manager": "readonly",
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]
    homes = {
        name: str(folder / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    log = folder / "jupyterlab.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **homes, "CSPINE_ROOT": str(folder)},
            start_new_session=True,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            if server.poll() is not None:
                raise RuntimeError(f"JupyterLab stopped:\n{log.read_text()}")
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            except OSError:
                time.sleep(0.3)
        else:
            raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")
        yield f"{address}/lab/tree/04_thresholds.ipynb?token={token}&reset"
    finally:
        stop(server)


def stop(server: subprocess.Popen) -> None:
    """End the server, which ends its kernels; after twenty seconds by force."""
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@dataclass
class Explorer:
    """Notebook 04 in the browser, after all of its cells have run.

    Attributes:
        page: where it is.
        address: of the notebook.
        errors: what the page's own code complained about.
    """

    page: Page
    address: str
    errors: list[str]

    def ask(self, code: str) -> str:
        """What the notebook's kernel prints when it runs this code."""
        return str(self.page.evaluate(ASK, code))

    def run(self, command: str, **options: object) -> Any:
        """Run a command of JupyterLab, as its menus do."""
        return self.page.evaluate(
            "([name, options]) => jupyterapp.commands.execute(name, options).then(done => done === true)",
            [command, options],
        )

    def show(self) -> None:
        """Scroll to the slider, give it the keyboard, and call it `slider` in the kernel.

        Raises:
            RuntimeError: no cell shows one.
        """
        model = self.page.evaluate(FIND, self.ask(SLIDERS).split())
        if not model:
            raise RuntimeError("No cell of the notebook shows a ThresholdExplorer. Put it last in its cell.")
        self.ask(
            "slider = next(one for one in list(globals().values())"
            f" if isinstance(one, ThresholdExplorer) and one.widget.model_id == {model!r})"
        )
        self.page.locator(".cspine-numbers").wait_for()
        self.page.wait_for_timeout(500)  # scrolling ends
        self.page.locator(HANDLE).first.focus()

    def replace(self, code: str) -> None:
        """Put other code into the slider's cell and run it.

        Raises:
            RuntimeError: it fails.
        """
        self.show()
        self.page.evaluate(
            "code => jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.setSource(code)",
            code,
        )
        self.run("notebook:clear-cell-output")
        if not self.run("notebook:run-cell"):
            raise RuntimeError(f"This cell failed:\n{code}")
        self.show()

    def words(self) -> str:
        """The line below the picture."""
        return self.page.locator(".cspine-numbers").inner_text()

    def press(self, key: str) -> str:
        """Press a key and wait until the line below the picture has changed; gives the new line."""
        before = self.words()
        self.page.keyboard.press(key)
        self.page.wait_for_function(
            "before => document.querySelector('.cspine-numbers').innerText !== before",
            arg=before,
            timeout=10_000,
        )
        return self.words()


def open_explorer(running: Browser, address: str, *, run: bool = True, **options: Any) -> Explorer:
    """Open notebook 04 in a new window, as large as a small laptop's, and run all of its cells.

    Args:
        running: of `browser`.
        address: of `jupyterlab`.
        run: False: show what an earlier window ran and saved; the kernel is the same.
        options: of Playwright's `new_page`.

    Raises:
        RuntimeError: a cell fails, or there is no slider.
    """
    page = running.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
    page.set_default_timeout(PATIENCE_MS)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
    explorer = Explorer(page, address, errors)
    page.wait_for_function("jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'")
    if run and not explorer.run("notebook:run-all-cells"):
        raise RuntimeError(f"Not all cells ran: {page.evaluate(FAILED)}")
    explorer.show()
    return explorer
