"""Downloads of checkpoints from a local test server, and open_clip model names."""
import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from clip import download


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def serve(folder, content: bytes, name: str, checksum: str | None = None) -> str:
    """Store a file at <sha256>/<name>, OpenAI's layout; return this path."""
    checksum = checksum or hashlib.sha256(content).hexdigest()
    (folder / checksum).mkdir(exist_ok=True)
    (folder / checksum / name).write_bytes(content)
    return f"{checksum}/{name}"


def test_resolve_downloads_a_model_once_and_checks_it(server, tmp_path, monkeypatch):
    folder, address = server
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(download, "OPENAI", address)
    path = serve(folder, b"weights" * 1000, "ViT-B-16.pt")
    monkeypatch.setitem(download.OPENAI_MODELS, "ViT-B/16", path)
    file = download.resolve("ViT-B/16").file
    assert file == tmp_path / ".cache" / "clip" / "ViT-B-16.pt"
    assert file.read_bytes() == b"weights" * 1000
    (folder / path).unlink()
    assert download.resolve("ViT-B/16").file == file  # from the cache, without the server
    file.write_bytes(b"damaged")  # a damaged file in the cache is downloaded again
    with pytest.raises(OSError, match="cannot download"):
        download.resolve("ViT-B/16")


def test_wrong_checksum_raises_and_leaves_no_file(server, tmp_path):
    folder, address = server
    path = serve(folder, b"other bytes", "ViT-B-16.pt", checksum="0" * 64)
    found = hashlib.sha256(b"other bytes").hexdigest()
    with pytest.raises(OSError, match=f"has the sha256 {found}, expected {'0' * 64}: try again"):
        download.fetch(f"{address}/{path}", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_incomplete_download_raises_and_leaves_no_file(server, tmp_path, monkeypatch):
    """The address contains no checksum."""
    folder, address = server
    (folder / "model.pt").write_bytes(b"weights")
    send_header = Quiet.send_header

    def longer(handler, key, value):
        send_header(handler, key, "9" if key == "Content-Length" else value)

    monkeypatch.setattr(Quiet, "send_header", longer)
    with pytest.raises(OSError, match="stopped at 7 of 9 bytes"):
        download.fetch(f"{address}/model.pt", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_checksum_prefix_in_a_file_name_is_checked(server, tmp_path):
    folder, address = server
    digest = hashlib.sha256(b"abc").hexdigest()[:8]
    (folder / f"vit_b_16-{digest}.pt").write_bytes(b"abc")
    assert download.fetch(f"{address}/vit_b_16-{digest}.pt", tmp_path / "cache").read_bytes() == b"abc"
    (folder / "vit_b_16-00000000.pt").write_bytes(b"abc")
    with pytest.raises(OSError, match=f"has the sha256 {digest}[0-9a-f]+, expected 00000000: try again"):
        download.fetch(f"{address}/vit_b_16-00000000.pt", tmp_path / "cache")


def test_unreachable_server_raises_a_one_line_error(tmp_path):
    with pytest.raises(OSError, match="cannot download") as caught:
        download.fetch("http://127.0.0.1:9/model.pt", tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_resolve_accepts_open_clip_models_with_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model 'ViT-Q'"):
        download.resolve("ViT-Q:openai")
    with pytest.raises(FileNotFoundError, match="no weights 'nothing'"):
        download.resolve("ViT-B-16:nothing")
    (tmp_path / "file.pt").write_bytes(b"")
    source = download.resolve(f"ViT-B-16:{tmp_path / 'file.pt'}")
    assert source.open_clip and source.conventions == {"activation": "gelu"}
    assert download.resolve(str(tmp_path / "file.pt")) == download.Source(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("ViT-B-16-SigLIP", "timm_model_name"),
        ("ViT-H-14", "head_width = 80"),
        ("ViT-L-14-worldwide", "text_cfg sets"),
        ("coca_ViT-B-32", "sets"),
    ],
)
def test_models_of_another_architecture_raise(tmp_path, model, reason):
    (tmp_path / "file.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="its architecture differs from OpenAI's CLIP") as caught:
        download.resolve(f"{model}:{tmp_path / 'file.pt'}")
    assert reason in str(caught.value)


@pytest.mark.parametrize("model", ["ViT-B-16", "ViT-B-32-quickgelu", "ViT-L-14-336", "RN50", "RN50x64"])
def test_models_of_openais_architecture_are_accepted(tmp_path, model):
    (tmp_path / "file.pt").write_bytes(b"")
    assert download.resolve(f"{model}:{tmp_path / 'file.pt'}").open_clip


def test_resolve_returns_normalization_and_activation_of_open_clip_weights(tmp_path, monkeypatch):
    """Some open_clip weights were trained with a different mean and standard deviation from OpenAI's."""
    monkeypatch.setattr(download, "fetch", lambda url, folder: tmp_path / "file.pt")
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", lambda *_, **__: tmp_path / "file.pt")
    source = download.resolve("ViT-L-14:laion2b_s32b_b82k")
    assert source.conventions["mean"] == source.conventions["std"] == (0.5, 0.5, 0.5)
    assert download.resolve("ViT-B-16:openai").conventions["activation"] == "quick_gelu"


CFG = '"model_cfg": {"vision_cfg": {}, "text_cfg": {}'
PREPROCESSING = f'{{{CFG}}}, "preprocess_cfg": '
NESTED = '{"model_cfg": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("content", [
    "[1]", '{"model_cfg": 3}', "{", "{}", "\xff", NESTED, f'{{{CFG}, "quick_gelu": "no"}}}}',
    *(f"{PREPROCESSING}{part}}}"
      for part in ('{"mean": [NaN, 1, 1]}', '{"mean": "abc"}', '{"std": [1, 0, 1]}', '{"std": [1]}', "[1]")),
])  # fmt: skip
def test_invalid_open_clip_configuration_is_named_in_the_error(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(b"")
    (tmp_path / "open_clip_config.json").write_text(content, encoding="latin1")
    with pytest.raises(ValueError, match="open_clip_config"):
        download.resolve(str(tmp_path / "model.pt"))
