"""Nothing here needs the network, or tries it; and the refusal that shows it does refuse."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import run as runner

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "cspine_helpers").rglob("[a-z]*.py")
)
OUTSIDE = "192.0.2.1"  # reserved for documentation, belongs to nobody (RFC 5737)
ATTEMPTS = {
    "socket.socket().connect(('192.0.2.1', 80))": "socket.connect ('192.0.2.1', 80)",
    "socket.socket().connect_ex(('192.0.2.1', 80))": "socket.connect ('192.0.2.1', 80)",
    "socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 9))": "socket.sendto ('192.0.2.1', 9)",
    "socket.socket(socket.AF_INET6).connect(('2001:db8::1', 80))": "socket.connect ('2001:db8::1', 80)",
    "socket.getaddrinfo('example.org', 443)": "socket.getaddrinfo 'example.org'",
    "socket.gethostbyname('example.org')": "socket.gethostbyname 'example.org'",
    "urllib.request.urlopen('http://192.0.2.1/')": "socket.getaddrinfo '192.0.2.1'",
    "asyncio.run(asyncio.open_connection('example.org', 80))": "socket.getaddrinfo 'example.org'",
}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("code", ATTEMPTS)
def test_an_attempt_is_refused_and_noted(code, no_network):
    found = python(f"import asyncio, socket, urllib.request\n{code}")
    assert found.returncode == 1
    assert f"This test refuses the network: {ATTEMPTS[code]}" in found.stderr
    assert ATTEMPTS[code] in no_network.read_text()
    no_network.unlink()


def test_an_attempt_whose_error_is_swallowed_is_noted(no_network):
    code = (
        "import contextlib, socket\nwith contextlib.suppress(OSError): socket.create_connection(('x.org', 1))"
    )
    assert python(code).returncode == 0
    assert no_network.read_text() == "socket.getaddrinfo 'x.org' in -c\n"
    no_network.unlink()


def test_this_machine_can_be_reached(no_network):
    code = """
import socket
for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "localhost")):
    with socket.create_server((host, 0), family=family) as server, socket.create_connection(
        (host, server.getsockname()[1])
    ):
        pass
a, b = socket.socketpair()
"""
    assert python(code).stderr == ""


@pytest.mark.slow
def test_a_notebook_that_tries_fails_and_its_bars_and_figures_do_not(no_network, tmp_path):
    path = tmp_path / "01_tiny.ipynb"
    cells = ["COHORT = 'builtin'", "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)): pass"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    runner.execute(path)
    assert not no_network.exists()
    notebook.cells += [
        nbformat.v4.new_code_cell(f"import socket\nsocket.create_connection(('{OUTSIDE}', 80))")
    ]
    nbformat.write(notebook, path)
    with pytest.raises(RuntimeError, match=rf"cell 3: ConnectionRefusedError: .* refuses .*'{OUTSIDE}'"):
        runner.execute(path)
    no_network.unlink()


@pytest.mark.slow
def test_no_import_tries_the_network(no_network):
    modules = "\n".join(f"import {name}" for name in MODULES)
    found = python(f"import sys\n{modules}\nassert 'sitecustomize' in sys.modules")
    assert found.returncode == 0, found.stderr
    assert len(MODULES) > 25
