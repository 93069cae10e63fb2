"""The check of links that lead elsewhere, against a server of this machine."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import links


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(self.path.strip("/")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_links_are_found_outside_of_code(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](http://a.org/x#part) <https://b.org> [c](c.md)\n```bash\n# [d](http://d.org)\n```\n")
    assert links.external_links([page]) == {"http://a.org/x": [str(page)], "https://b.org": [str(page)]}


def test_a_page_that_is_gone_is_named_with_where_it_is_linked(address):
    pages = {f"{address}/{status}": ["README.md"] for status in (200, 403, 404)}
    code, told = links.judge({each: links.ask(each) for each in pages}, pages)
    assert code == 1 and told == f"{address}/404: 404; in README.md\n3 links, 1 of them lead nowhere"


def test_a_host_that_does_not_answer_is_named_where_others_do(address):
    nobody = "http://127.0.0.1:9/"
    pages = {f"{address}/200": ["a.md"], nobody: ["b.md"]}
    code, told = links.judge({each: links.ask(each) for each in pages}, pages)
    assert code == 1 and f"{nobody}: no answer; in b.md" in told


def test_without_a_network_nothing_is_checked():
    nobody = "http://127.0.0.1:9/"
    assert links.judge({nobody: links.ask(nobody)}, {nobody: ["b.md"]}) == (
        0,
        "no network: none of 1 links was checked",
    )
