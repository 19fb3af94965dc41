"""The viewer as a process: its HTTP interface, and the page in a browser if one is available."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simsiam import cli
from simsiam.clusters import clusters
from simsiam.config import UserError
from simsiam.embeddings import embed_to, read_embeddings
from simsiam.runs import write_json
from simsiam.search import search
from simsiam.show.viewer import HEADERS, UPLOAD, Viewer, serve

pytestmark = pytest.mark.usefixtures("one_thread")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Server:
    """`simsiam view` as a user starts it, on a free port."""

    def __init__(self, folder: Path, command: list[str] | None = None) -> None:
        usual = [sys.executable, "-m", "simsiam", "view", str(folder), "--no-browser", "--port", "0"]
        self.process = subprocess.Popen(command or usual, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.search(r"http://\S+", line):
                self.address = found[0]
                self.state = self.json("about")["state"]
                return
        self.stop()
        raise AssertionError(said)

    def stop(self, sign: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """Stop the server; return the exit status and its last output."""
        self.process.send_signal(sign)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def get(self, path: str, **options: Any) -> bytes:
        whole = path if path in ("", "about") else f"{self.state}/{path}"
        request = urllib.request.Request(self.address + whole, **options)
        with urllib.request.urlopen(request, timeout=120) as answer:
            content: bytes = answer.read()
            return content

    def json(self, path: str, **options: Any) -> Any:
        return json.loads(self.get(path, **options))

    def refuses(self, path: str, **options: Any) -> tuple[int, str]:
        with pytest.raises(urllib.error.HTTPError) as error:
            self.get(path, **options)
        return error.value.code, error.value.read().decode()


@pytest.fixture(scope="module")
def server(stored: Path) -> Iterator[Server]:
    started = Server(stored)
    yield started
    assert started.stop() == (0, ""), "Ctrl-C is how a viewer ends: no error"


def test_pictures_are_those_of_the_images(server: Server, stored: Path, photos: Path) -> None:
    ids = read_embeddings(stored).ids
    for row in (0, 40, 95):
        image = Image.open(photos / ids[row]).convert("RGB")
        assert np.array_equal(Image.open(io.BytesIO(server.get(f"original/{row}"))), image)
        small = Image.open(io.BytesIO(server.get(f"picture/{row}")))
        assert np.abs(np.asarray(small, float).mean((0, 1)) - np.asarray(image, float).mean((0, 1))).max() < 5
    about = server.json("about")
    assert (
        about["title"] == photos.name
        and about["images"] == 96
        and about["classes"] == ["noise", "rings", "stripes"]
        and about["no_pictures"] is None
    )


def test_neighbours_are_those_of_search(server: Server, stored: Path, photos: Path) -> None:
    ids = read_embeddings(stored).ids
    for row in (3, 50):
        (wanted,) = search(stored, [ids[row]], k=5)
        found = server.json(f"near/{row}?k=5")
        assert found["row"] == row and found["class"] == ids[row].split("/")[0]
        assert found["id"] == ids[row] and [each["score"] for each in found["neighbours"]] == pytest.approx(
            [each["score"] for each in wanted["neighbours"]], abs=1e-4
        )
        assert found["on_map"][0] == row  # all 96 are on the map
    found = server.json("near?k=4", data=(photos / ids[17]).read_bytes(), method="POST")
    assert len(found["neighbours"]) == 4 and found["neighbours"][0]["id"] == ids[17]


def test_images_are_found_by_name_class_and_cluster(server: Server) -> None:
    every = server.json("images?count=500")
    assert every["total"] == 96 == len({item["row"] for item in every["items"]})
    pages = [server.json(f"images?start={start}&count=40")["items"] for start in (0, 40, 80)]
    assert [item for page in pages for item in page] == every["items"]
    rings = server.json("images?class=rings&count=500")
    assert rings["total"] == 32 and all(item["class"] == "rings" for item in rings["items"])
    assert [item["id"] for item in server.json("images?text=RINGS/001")["items"]] == ["rings/001.png"]
    found = server.json("clusters")
    assert sum(each["images"] for each in found["clusters"]) == 96 and found["clusters"][0]["examples"][0]["id"]
    first = server.json("images?cluster=0&count=500")
    assert first["total"] == found["clusters"][0]["images"]
    assert first["items"][:9] == found["clusters"][0]["examples"]  # nearest to the centre first


def test_the_map_and_its_pictures_belong_together(server: Server, stored: Path) -> None:
    found = server.json("map")
    assert found["ids"] == read_embeddings(stored).ids
    assert found["rows"] == list(range(96)) and min(found["x"]) == 0 and max(found["y"]) == 1
    whole = Image.open(io.BytesIO(server.get("atlas"))).convert("RGBA")
    atlas = whole.convert("RGB")
    side, columns = found["side"], found["columns"]
    for place in (0, 33, 95):
        left, top = place % columns * side, place // columns * side
        middle = (left + side // 4, top + side // 4, left + 3 * side // 4, top + 3 * side // 4)
        of_map = np.asarray(atlas.crop(middle), float).mean((0, 1))
        own = Image.open(io.BytesIO(server.get(f"picture/{found['rows'][place]}"))).convert("RGB").resize((side, side))
        of_image = np.asarray(own.crop((side // 4, side // 4, 3 * side // 4, 3 * side // 4)), float).mean((0, 1))
        assert np.abs(of_map - of_image).max() < 20
        shown, aspect = (
            np.asarray(whole.crop((left, top, left + side, top + side)))[..., 3] > 127,
            found["aspect"][place],
        )
        assert (
            abs(shown.any(0).sum() - side * min(1, aspect)) <= 1
            and abs(shown.any(1).sum() - side / max(1, aspect)) <= 1
        )
    assert (stored / "map.json").exists()
    assert server.json("map") == found and "groups" in server.json("duplicates")


def test_what_cannot_be_is_refused_in_words(server: Server) -> None:
    assert server.refuses("near/96")[0] == 404 and server.refuses("picture/-1")[0] == 404
    assert server.refuses("near", data=b"no image", method="POST") == (
        422,
        '{"detail":"This is not a readable image: text, not an image."}',
    )
    # An upload of the maximum size is read and found not to be an image; one byte more is rejected.
    assert server.refuses("near", data=bytes(UPLOAD), method="POST")[0] == 422
    assert server.refuses("near", data=bytes(UPLOAD + 1), method="POST") == (
        413,
        '{"detail":"The file is larger than 64 MB."}',
    )


def test_pages_elsewhere_get_nothing(server: Server, photos: Path) -> None:
    assert server.refuses("about", headers={"Host": "elsewhere.example"})[0] == 400  # a name that points here
    for host in ("[::1]:8000", "localhost:8000", "127.0.0.1"):
        assert server.json("about", headers={"Host": host})
    image = (photos / "rings/001.png").read_bytes()
    for origin in ("http://elsewhere.example", "null", "http://127.0.0.1:1"):
        headers = {"Origin": origin}
        assert server.refuses("near", data=image, method="POST", headers=headers)[0] == 403, origin
    headers = {"Origin": server.address.rstrip("/")}
    assert server.json("near", data=image, method="POST", headers=headers)["neighbours"]
    for path in ("", "about", f"{server.state}/picture/0", f"{server.state}/near/96", "0/map", "nothing"):
        try:
            answer: Any = urllib.request.urlopen(server.address + path, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            assert [answer.headers.get_all(name) for name, _ in HEADERS] == [[value] for _, value in HEADERS], path


def test_a_picture_is_kept_under_an_address_of_its_embeddings_alone(
    server: Server, stored: Path, photos: Path, tmp_path: Path
) -> None:
    for row in (0, 95):
        with urllib.request.urlopen(f"{server.address}{server.state}/picture/{row}", timeout=60) as answer:
            assert "immutable" in answer.headers["Cache-Control"]
    run = stored.parent / "run"
    embed_to(run, photos / "rings", tmp_path / "other")
    other = Viewer(tmp_path / "other")
    assert other.state != server.state == Viewer(stored).state
    other_address = f"{server.address}{other.state}/picture/0"  # a URL of the other viewer, on the same port
    with pytest.raises(urllib.error.HTTPError) as gone:
        urllib.request.urlopen(other_address, timeout=60)
    assert gone.value.code == 410 and "Cache-Control" not in gone.value.headers
    embed_to(run, photos / "rings", tmp_path / "other")  # same content: what a browser has cached stays valid
    assert other.stored.replaced() and Viewer(tmp_path / "other").state == other.state


def test_embeddings_that_are_brought_up_to_date_are_shown(stored: Path, photos: Path, tmp_path: Path) -> None:
    run, images, folder = stored.parent / "run", tmp_path / "images", tmp_path / "vectors"
    shutil.copytree(photos, images)
    embed_to(run, images, folder)
    server = Server(folder)
    try:
        first, before = server.get("picture/0"), server.json("clusters")
        (folder / "meta.json").rename(tmp_path / "meta.json")  # as during writing
        assert server.json("about")["state"] == server.state and server.get("picture/0") == first
        (tmp_path / "meta.json").rename(folder / "meta.json")
        Image.new("RGB", (40, 40), "red").save(images / "a.png")  # sorts before all others
        embed_to(run, images, folder)
        assert server.refuses("picture/0")[0] == server.refuses("clusters")[0] == 410
        about = server.json("about")
        assert about["images"] == 97 and about["state"] != server.state
        server.state = about["state"]
        assert server.json("map")["ids"][0] == "a.png" and server.get("picture/0") != first
        assert server.get("picture/1") == first
        after = server.json("clusters")
        assert sum(each["images"] for each in after["clusters"]) == 97 and after["count"] == before["count"]
        assert server.json("images?cluster=0")["total"] == after["clusters"][0]["images"]
        assert pq.read_table(folder / "clusters.parquet")["id"].to_pylist() == read_embeddings(folder).ids
        assert "groups" in server.json("duplicates") and server.json("map")["rows"] == list(range(97))
    finally:
        server.stop(signal.SIGTERM)


def test_what_was_read_goes_on_together_while_the_folder_changes(
    stored: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, images, folder = stored.parent / "run", tmp_path / "images", tmp_path / "vectors"
    shutil.copytree(photos / "rings", images)
    embed_to(run, images, folder)
    viewer = Viewer(folder)
    Image.new("RGB", (40, 40), "red").save(images / "0.png")
    embed_to(run, images, folder)
    about, found = viewer.clusters()
    assert about["images"] == len(found.label) == 32 and viewer.images(0, 99, "", None, 0)["items"]
    assert viewer.stored.images()[1].tolist() == list(range(1, 33)) and viewer.duplicates()["images"] == 32

    def meanwhile(*arguments: Any, **settings: Any) -> Any:
        write_json(folder / "meta.json", json.loads((folder / "meta.json").read_text()))
        return load(*arguments, **settings)

    load = np.load
    monkeypatch.setattr("simsiam.embeddings.np.load", meanwhile)
    with pytest.raises(UserError, match="was rewritten while it was being read"):
        read_embeddings(folder)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_works_in_a_browser(server: Server, tmp_path: Path) -> None:
    for view, wanted in {"": 90, "#image/5": 36, "#clusters": 9, "#odd": 9}.items():
        assert BROWSER is not None
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
        command += ["--virtual-time-budget=20000", server.address + view]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        assert shown.count('class="tile"') >= wanted, view
        assert "96 images" in shown and 'class="note"' not in shown


def test_without_images_there_is_still_a_map(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "vectors")
    meta = json.loads((stored / "meta.json").read_text())
    (tmp_path / "vectors" / "meta.json").write_text(json.dumps(meta | {"data": str(tmp_path / "gone")}))
    server = Server(tmp_path / "vectors")
    try:
        assert "gone" in server.json("about")["no_pictures"]
        assert server.refuses("picture/0")[0] == 404
        assert server.json("map")["columns"] is None and server.json("near/0")["neighbours"]
    finally:
        server.stop(signal.SIGTERM)


def test_the_clusters_stay_those_that_were_asked_for(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "vectors", ignore=shutil.ignore_patterns("clusters.parquet"))
    usual = pq.read_table(clusters(tmp_path / "vectors", 4)["file"])
    asked = clusters(tmp_path / "vectors", 4, seed=3)
    written = pq.read_table(asked["file"])
    assert written["cluster"] != usual["cluster"]
    about, found = Viewer(tmp_path / "vectors").clusters()
    assert about["count"] == 4 and found.label.tolist() == written["cluster"].to_pylist()
    assert pq.read_table(asked["file"]).equals(written, check_metadata=True)
    Path(asked["file"]).write_bytes(b"damaged")
    assert Viewer(tmp_path / "vectors").clusters()[0]["count"] == 9  # a tenth of the images


def test_a_damaged_map_is_made_again(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "vectors")
    whole = Viewer(tmp_path / "vectors").map()
    kept = json.loads((tmp_path / "vectors" / "map.json").read_text())
    for damage in ("no JSON", "[]", "{}", json.dumps(kept | {"place": kept["place"][:5]})):
        (tmp_path / "vectors" / "map.json").write_text(damage)
        assert Viewer(tmp_path / "vectors").map() == whole
        assert json.loads((tmp_path / "vectors" / "map.json").read_text()) == kept


def test_a_folder_that_cannot_be_written_to_is_shown_as_well(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = shutil.ignore_patterns("clusters.parquet", "map.json")
    shutil.copytree(stored, tmp_path / "vectors", ignore=kept)
    refuse = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr("simsiam.runs.os.replace", lambda *_: (_ for _ in ()).throw(refuse))
    viewer = Viewer(tmp_path / "vectors")
    about, found = viewer.clusters()
    assert about["count"] == 9 and len(about["on_map"]) == len(found.label) == 96
    assert viewer.images(0, 500, "", None, 0)["total"] == about["clusters"][0]["images"]
    assert viewer.map()["rows"] == list(range(96)) and "groups" in viewer.duplicates()
    assert not list((tmp_path / "vectors").glob("*clusters*"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a desktop")
@pytest.mark.parametrize("desktop", [True, False])
def test_a_browser_is_opened_where_there_is_a_desktop(monkeypatch: pytest.MonkeyPatch, desktop: bool) -> None:
    """Else Python would start a text browser here, which waits for the page before it is served."""
    opened: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr("webbrowser.open", opened.put)
    monkeypatch.setattr("simsiam.show.viewer.serve", lambda *_, ready, **__: ready("http://here/"))
    monkeypatch.setattr("os._exit", lambda status: None)
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: None)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    if desktop:
        monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    cli.view(Path("vectors"))
    if desktop:
        assert opened.get(timeout=10) == "http://here/"
    else:
        with pytest.raises(queue.Empty):
            opened.get(timeout=0.2)


def test_mistakes_are_one_clear_line(stored: Path, server: Server) -> None:
    with pytest.raises(UserError, match="simsiam embed"):
        Viewer(stored.parent / "run")
    port = server.address.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "simsiam", "view", str(stored), "--no-browser", "--port", port]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2 and "choose another --port" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    for nobodys in ("203.0.113.1", "no host"):
        with pytest.raises(UserError, match=r"\([^()]*\): choose another --host"):
            serve(stored, host=nobodys, port=0)


class Tab:
    """A page in headless Chromium, driven by the DevTools protocol over two pipes."""

    def __init__(self, address: str, profile: Path) -> None:
        assert BROWSER is not None
        (read, answers), (questions, write) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (questions, answers)]  # 3 and 4 are for the browser
        os.close(questions)
        os.close(answers)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,800", f"--user-data-dir={profile}"]

        def place() -> None:
            for end, number in zip(ends, (3, 4), strict=True):
                os.dup2(end, number)

        self.process = subprocess.Popen(
            [BROWSER, *flags, "--remote-debugging-pipe", "about:blank"],
            pass_fds=(3, 4),
            preexec_fn=place,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        self.write, self.read = open(write, "wb"), open(read, "rb")  # noqa: SIM115
        self.number, self.buffer, self.session = 0, b"", None
        page = next(each for each in self.ask("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        self.ask("Page.navigate", url=address)

    def ask(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while True:
            while b"\0" not in self.buffer:
                found = self.read.read1(1 << 16)
                assert found, "the browser has ended"
                self.buffer += found
            told, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(told)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        deadline = time.monotonic() + 60
        while not self.run(condition):
            assert time.monotonic() < deadline, (condition, self.run("document.body.innerText"))
            time.sleep(0.05)

    def pointer(self, kind: str, x: float, y: float, **more: Any) -> None:
        event = json.dumps({"clientX": x, "clientY": y, "bubbles": True, "pointerId": 1, "button": 0, **more})
        self.run(f"canvas.dispatchEvent(new PointerEvent('pointer{kind}', {event}))")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.write.close()
        self.read.close()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_is_used_as_a_person_uses_it(stored: Path, tmp_path: Path) -> None:
    tiles = "document.querySelectorAll('.tile').length"
    with contextlib.ExitStack() as ends:
        server = Server(stored)
        ends.callback(server.process.communicate)
        ends.callback(server.process.kill)
        tab = Tab(server.address, tmp_path)
        ends.callback(tab.close)
        tab.until(f"typeof map !== 'undefined' && map && {tiles} === 90")
        # What the list was narrowed down to is there again after Back.
        change = "new Event('change')"
        tab.run(f"const kind = $('right').querySelector('select'); kind.value = 'rings'; kind.dispatchEvent({change})")
        tab.until(f"{tiles} === 32")
        tab.run("document.querySelector('.tile').click()")
        tab.until("location.hash.startsWith('#image/') && document.body.innerText.includes('Most similar')")
        assert tab.run(tiles) == 36
        tab.run("history.back()")
        tab.until(f"{tiles} === 32 && $('right').querySelector('select')?.value === 'rings'")
        assert tab.run("$('status').textContent") == "32 images shown"
        # On the map, a click opens an image, a drag moves it, and two fingers zoom about what is between them.
        tab.run(
            "canvas.setPointerCapture = () => {}; const spotOf = i => { const b = canvas.getBoundingClientRect(); "
            "const [x, y] = spot(i); return [x + b.left, y + b.top]; }"
        )
        x, y = tab.run("spotOf(7)")
        tab.pointer("move", x, y)
        assert tab.run("!$('tip').hidden && $('tip').innerText.includes('.png')")
        tab.pointer("down", x, y, button=2)
        tab.pointer("up", x, y, button=2)
        assert tab.run("location.hash") in ("", "#images")
        tab.pointer("down", x, y)
        tab.pointer("move", x + 40, y + 30)
        tab.pointer("up", x + 40, y + 30)
        assert tab.run("[left, top_, scale]") == [40, 30, 1] and tab.run("location.hash") in ("", "#images")
        tab.pointer("down", 200, 300)
        tab.pointer("down", 300, 300, pointerId=2)
        tab.pointer("move", 400, 300, pointerId=2)
        place = tab.run("[left, top_, scale]")
        assert place[2] == 2
        tab.pointer("up", 400, 300, pointerId=2)
        tab.pointer("move", 203, 304)
        assert tab.run("[left, top_, scale]") == [place[0] + 3, place[1] + 4, 2]
        tab.pointer("up", 203, 304)
        tab.run("fit()")
        x, y = tab.run("spotOf(7)")
        tab.pointer("down", x, y)
        tab.pointer("up", x, y)
        tab.until("location.hash.startsWith('#image/') && document.body.innerText.includes('Most similar')")
        # Once the viewer has stopped, the list says so.
        tab.run("location.hash = '#images'")
        tab.until(f"{tiles} === 32 && $('right').querySelector('select')?.value === 'rings'")
        assert server.stop() == (0, "")
        tab.run(
            f"const again = $('right').querySelector('select'); again.value = 'noise'; again.dispatchEvent({change})"
        )
        tab.until("document.body.innerText.includes('The viewer has stopped')")


def test_ctrl_c_does_not_wait_for_what_is_computed(stored: Path) -> None:
    script = (
        "import sys, time\nfrom simsiam import cli\nfrom simsiam.show import viewer\n"
        "viewer.find_duplicates = lambda *_, **__: (print('computing', file=sys.stderr, flush=True), time.sleep(120))\n"
        f"sys.argv = ['simsiam', 'view', {str(stored)!r}, '--no-browser', '--port', '0']\ncli.main()\n"
    )
    server = Server(stored, [sys.executable, "-c", script])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.get, "duplicates")
        assert server.process.stderr is not None and "computing" in server.process.stderr.readline()
        began = time.monotonic()
        status, said = server.stop()
        assert (status, said) == (0, "") and time.monotonic() - began < 30
        assert asked.exception(60) is not None


def test_a_device_that_is_none_is_named_at_once(stored: Path) -> None:
    with pytest.raises(UserError, match="Device 'gpu' cannot be used"):
        Viewer(stored, "gpu")
