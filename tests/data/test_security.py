"""Data from strangers: nothing that it names leads outside of its folder, makes memory explode or runs code."""

from __future__ import annotations

import ast
import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import refalign_ext.data
from refalign_ext.data.cache.files import open_chunk
from refalign_ext.data.check.run import check
from refalign_ext.data.clip_index import measure
from refalign_ext.data.clip_set import ShardRows, open_clip_set
from refalign_ext.data.convert.folder import convert_folder
from refalign_ext.data.decoding import read_clip, read_frame
from refalign_ext.data.loading.source import ClipSource
from refalign_ext.data.manifest_file import ManifestReader
from refalign_ext.data.materialise.run import materialise
from refalign_ext.data.media_source import MediaBytes
from refalign_ext.data.sampling.sample_spec import Bucket, Sampling
from refalign_ext.data.schema import VideoSpan
from refalign_ext.data.shards import ShardInfo, scan_shard, sha256_of, shard_name, write_listing
from refalign_ext.data.video_file import probe
from refalign_ext.references import MAX_PIXELS, load_image
from tests.helpers.clips import entry, render

DATA = Path(refalign_ext.data.__file__).parent
SECRET = b"nobody may read this"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("media")
    Image.new("RGB", (20, 30), "red").save(folder / "picture.png")
    return {path.name: path.read_bytes() for path in (render(folder / "clip.mp4", 8), folder / "picture.png")}


@pytest.fixture
def root(tmp_path: Path, media: dict[str, bytes]) -> Path:
    """A folder with a clip and a picture, beside things that are none of its business, and links to these."""
    for folder in ("set/inner", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("set", "outside"):
        for name, data in media.items():
            (tmp_path / folder / name).write_bytes(data)
    root = tmp_path / "set"
    (root / "linked.mp4").symlink_to(tmp_path / "outside" / "clip.mp4")
    (root / "linked.png").symlink_to("../outside/picture.png")
    (root / "linked").symlink_to(tmp_path / "outside", target_is_directory=True)
    (root / "circle.mp4").symlink_to("circle.mp4")
    (root / "circle.png").symlink_to("circle.png")
    os.mkfifo(root / "pipe.mp4")
    return root


def outside_names(root: Path, suffix: str) -> list[str]:
    """Names of a file that exists outside of `root`, by every way that leads there."""
    stem = {"mp4": "clip.mp4", "png": "picture.png"}[suffix]
    outside = root.parent / "outside" / stem
    names = [f"../outside/{stem}", f"inner/../../outside/{stem}", f"./.././outside/{stem}", str(outside)]
    names += [f"..\\outside\\{stem}", f"\\\\server\\{stem}", f"C:\\{stem}", f"C:{stem}", f"//host/{stem}"]
    names += [
        f"linked.{suffix}",
        f"linked/{stem}",
        f"inner/../linked/{stem}",
        f"file:{outside}",
        f"file://{outside}",
    ]
    return names + [f"circle.{suffix}", f"{stem}\0", f"inner/../../set/{stem}", "/dev/zero", "", ".", "inner"]


def line(video: str = "clip.mp4", picture: str = "picture.png", name: str = "a") -> str:
    return json.dumps({"id": name, "video": video, "prompt": "A box.", "references": [picture]})


def write_lines(root: Path, *lines: str) -> Path:
    path = root / "data.jsonl"
    path.write_text("".join(text + "\n" for text in lines))
    return path


def source(path: Path) -> ClipSource:
    return ClipSource(
        [open_clip_set(path)],
        Sampling((Bucket(32, 32, 5),)),
        encode=lambda videos: [video.mean(dim=(2, 3), keepdim=True) for video in videos],
        features=None,
        max_bad_share=1,
    )


# --- Manifests and tables


def test_manifests_name_nothing_outside_of_their_folder(root: Path) -> None:
    lines = [line(video=name, name=f"v{n}") for n, name in enumerate(outside_names(root, "mp4"))]
    lines += [line(picture=name, name=f"p{n}") for n, name in enumerate(outside_names(root, "png"))]
    path = write_lines(root, *lines, line(name="good"))
    result = check(path, workers=0)
    assert (result.rows, result.bad_rows) == (len(lines) + 1, len(lines))
    for pack in (False, True):
        report = materialise(path, root / f"out-{pack}", pack=pack)
        assert report.kept == {"clips": 1, "references": 1}
        clips = open_clip_set(root / f"out-{pack}")
        assert [clips[row].id for row in range(len(clips))] == ["good"]
    clips = source(path)
    assert {clips.samples(0, range(at, at + 1))[0].name for at in range(len(lines))} == {"good"}


def test_a_pipe_is_not_waited_for(root: Path) -> None:
    path = write_lines(root, line("pipe.mp4"))
    with pytest.raises(ValueError, match="no file"):
        open_clip_set(path).media(0, "pipe.mp4")
    assert check(path, workers=0).bad_rows == 1


def test_references_that_are_cut_stay_inside_too(root: Path) -> None:
    entries = []
    for name in outside_names(root, "mp4"):
        reference = {"pair": "cross", "video": {"path": name}, "frame": 0, "bg": "raw"}
        entries.append(entry(f"a{len(entries)}", {"path": "clip.mp4"}, [reference]))
    path = write_lines(root, *map(json.dumps, entries))
    assert check(path, workers=0).bad_rows == len(entries)
    assert materialise(path, root / "out").kept == {"clips": 0, "references": 0}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_name_nothing_outside_of_their_folder(root: Path, kind: str) -> None:
    rows = [{"video": name, "ref1": "picture.png"} for name in outside_names(root, "mp4")]
    rows += [{"video": "clip.mp4", "ref1": name} for name in outside_names(root, "png")]
    # Names that stay inside by way of the folder above are resolved here, but not kept in what is written.
    rows = [row for row in rows if not any(part in "".join(row.values()) for part in ("../set/", "\\"))]
    rows.append({"video": "clip.mp4", "ref1": "picture.png"})
    for number, row in enumerate(rows):
        row |= {"prompt": "A box.", "id": f"row-{number}"}
    path = root / f"table.{kind}"
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert_folder(path, root / "data.jsonl")
    with ManifestReader(root / "data.jsonl") as clips:
        assert [clip.id for clip in clips] == [f"row-{len(rows) - 1}"]


def test_folders_with_links_that_lead_out_or_in_circles(root: Path) -> None:
    for name in ("clip", "linked", "circle", "pipe"):
        (root / f"{name}.txt").write_text("A box.")
    for number, name in enumerate(("picture", "linked", "circle"), 1):
        (root / f"clip.ref{number}.png").symlink_to(f"{name}.png")
    (root / "text.mp4").write_bytes((root / "clip.mp4").read_bytes())
    (root / "text.txt").symlink_to("../outside/secret.txt")
    (root / "text.ref1.png").write_bytes((root / "picture.png").read_bytes())
    (root.parent / "outside" / "secret.txt").write_bytes(SECRET)
    (root / "pipe.ref1.png").symlink_to("picture.png")
    (root / "piped.mp4").write_bytes((root / "clip.mp4").read_bytes())
    os.mkfifo(root / "piped.txt")
    report = convert_folder(root, root / "data.jsonl")
    with ManifestReader(root / "data.jsonl") as clips:
        (clip,) = clips
    assert (clip.id, [ref.image for ref in clip.subjects[0].refs]) == ("clip", ["clip.ref1.png"])
    assert report.dropped["references"] == {"outside_folder": 1, "file_missing": 1}
    assert SECRET.decode() not in (root / "data.jsonl").read_text()


def test_names_that_are_not_utf8_are_dropped_and_told(root: Path) -> None:
    os.unlink(root / "pipe.mp4")
    files = {b"\xff.mp4": b"x", b"\xff.txt": b"A box.", b"\xff.ref1.png": b"x", b"clip.txt": b"A box."}
    for name, data in files.items():
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(data)
    (root / "clip.ref1.png").symlink_to("picture.png")
    report = convert_folder(root, root / "data.jsonl")
    assert report.kept["clips"] == 1
    assert json.loads((root / "data.jsonl.report.json").read_text(encoding="utf-8")) == report.to_dict()
    assert report.table().encode("utf-8")


# --- Tar shards


def packed(folder: Path, members: list[tarfile.TarInfo | tuple[str, bytes]], samples: int = 1) -> ShardRows:
    path = folder / shard_name(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            if isinstance(member, tuple):
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
            else:
                tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    write_listing(folder, [ShardInfo(shard_name(0), samples, path.stat().st_size, sha256_of(path))])
    return ShardRows(folder)


def header(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE],
)
def test_members_that_are_no_files_are_not_followed(root: Path, kind: bytes) -> None:
    row = line("0.mp4", "0.png").encode()
    secret = str(root.parent / "outside" / "clip.mp4")
    clips = packed(root, [("0.json", row), header("0.mp4", kind, secret), ("0.png", b"x")])
    assert clips[0].id == "a"
    with pytest.raises(ValueError, match="is not a plain file"):
        clips.media(0, "0.mp4")
    assert check(root, workers=0).bad_rows == 1
    assert materialise(root, root.parent / "out").kept["clips"] == 0


@pytest.mark.parametrize(
    "name", ["../0.mp4", "/0.mp4", "x/0.mp4", "0/../../0.mp4", "..", "0.mp4/", "a\\b.mp4"]
)
def test_members_with_a_path_are_not_used(root: Path, name: str) -> None:
    clips = packed(root, [("0.json", line("0.mp4", "0.png").encode()), (name, b"x"), ("0.png", b"x")])
    for asked in ("0.mp4", name, f"0.{name}"):
        with pytest.raises(ValueError, match="has no member|not a file of this sample"):
            clips.media(0, asked)
    before = sorted(path.name for path in root.parent.rglob("*"))
    materialise(root, root.parent / "out", pack=True)
    made = {path.name for path in root.parent.rglob("*")} - {*before}
    assert not any(part in "".join(made) for part in ("..", "/", "\\"))


@pytest.mark.parametrize("size", [3 << 30, 1 << 40, (1 << 62) + 1])
def test_members_are_not_believed_how_large_they_are(root: Path, size: int) -> None:
    members: list[Any] = [
        ("0.json", line("0.mp4", "0.png").encode()),
        ("0.png", b"x"),
        header("0.mp4", size=size),
    ]
    clips = packed(root, members)
    for ask in (clips.media, clips.file_size):
        with pytest.raises(ValueError, match="bytes|cut off"):
            ask(0, "0.mp4")
    # Even if the file says it has them: a hole takes no space, and is not read.
    with (root / shard_name(0)).open("r+b") as file:
        file.truncate(min(size, 3 << 30) + 8192)
    with pytest.raises(ValueError, match="bytes|cut off"):
        ShardRows(root).media(0, "0.mp4")
    assert len(scan_shard(root / shard_name(0)).members) == 3


def test_a_sample_has_its_own_files_only(root: Path) -> None:
    members = [("0.json", line("1.mp4", "1.png").encode()), ("1.json", line("1.mp4", "1.png", "b").encode())]
    clips = packed(root, [*members, ("1.mp4", b"x"), ("1.png", b"x")], samples=2)
    with pytest.raises(ValueError, match="not a file of this sample"):
        clips.media(0, "1.mp4")
    assert clips.media(1, "1.mp4").data == b"x"


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "shards/../../x.tar", "x.tar", "shards/a.tar"])
def test_lists_of_shards_name_nothing_else(root: Path, name: str) -> None:
    packed(root, [("0.json", line("0.mp4", "0.png").encode())])
    listing = json.loads((root / "shards.json").read_text())
    listing["shards"][0]["name"] = name
    (root / "shards.json").write_text(json.dumps(listing))
    with pytest.raises(ValueError, match=r"shards.json: .*shards\[0\]\.name"):
        open_clip_set(root)


# --- Pictures and videos


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is this large and has next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(MAX_PIXELS + 1, 1), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("place", ["file", "memory"])
def test_pictures_that_would_fill_the_memory(root: Path, size: tuple[int, int], place: str) -> None:
    data = png_of(*size)
    (root / "bomb.png").write_bytes(data)
    with pytest.raises(ValueError, match="megapixels|not a picture"):
        load_image(root / "bomb.png" if place == "file" else MediaBytes("bomb.png", data))
    path = write_lines(root, line(picture="bomb.png"))
    assert check(path, workers=0).bad_rows == 1
    assert materialise(path, root / "out").kept["clips"] == 0


def test_videos_that_would_fill_the_memory(root: Path) -> None:
    """The size that a container tells is believed before a frame is decoded, and no further."""
    data = (root / "clip.mp4").read_bytes()
    at = data.index(b"avc1") + 28  # width and height of the sample description
    huge = data[:at] + struct.pack(">HH", 65535, 65535) + data[at + 4 :]
    for read in (
        lambda media: read_frame(media, frame=0),
        probe,
        lambda media: read_clip(media, 2, (16, 16), 0),
    ):
        try:
            read(MediaBytes("huge.mp4", huge))
        except ValueError as error:
            assert "huge.mp4" in str(error)


def playlists(secret: Path) -> dict[str, str]:
    """What FFmpeg would follow to other files, or to the network."""
    address = f"file://{secret}"
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2.5,\n{secret}\n#EXT-X-ENDLIST\n",
        "hls, a network": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "hls, concat": f"#EXTM3U\n#EXTINF:1,\nconcat:{secret}|{secret}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {secret}\n",
        "concat, unmarked": f"file '{secret}'\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="0" bandwidth="1"><BaseURL>{address}</BaseURL></Representation></AdaptationSet></Period></MPD>',
        "imf": f'<?xml version="1.0"?><CompositionPlaylist><Id>{address}</Id></CompositionPlaylist>',
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "asx": f'<asx version="3.0"><entry><ref href="{address}"/></entry></asx>',
        "metadata": ";FFMETADATA1\ntitle=x\n",
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{address}" width="9" height="9"/></svg>',
    }


@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "ts", "mkv", "mpd", "ffconcat", "%03d.png"])
def test_files_that_send_ffmpeg_elsewhere_are_no_videos(root: Path, suffix: str) -> None:
    secret = (root.parent / "outside" / "clip.mp4").resolve()
    for kind, text in playlists(secret).items():
        path = root / f"a.{suffix}"
        path.write_text(text)
        for media in (path, MediaBytes(path.name, text.encode())):
            for read in (lambda media: read_frame(media, frame=0), probe):
                with pytest.raises(ValueError, match="cannot be decoded"):
                    pytest.fail(f"{kind}: {read(media)}")


@pytest.mark.parametrize(
    "name", ["concat:clip.mp4|clip.mp4", "file:clip.mp4", "http:127.0.0.1", "lavfi:testsrc", "-i"]
)
def test_names_that_look_like_protocols_are_names(root: Path, name: str) -> None:
    path = write_lines(root, line(video=name))
    clips = open_clip_set(path)
    with pytest.raises(ValueError, match="does not exist"):
        measure(clips, 0, VideoSpan(name))
    (root / name).write_bytes((root / "clip.mp4").read_bytes())
    assert measure(clips, 0, VideoSpan(name))[2] == 8


# --- Code


FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "yaml",
}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {"extractall", "extract", "unpack_archive", "load_model"}
FORBIDDEN_FUNCTIONS = {f"{owner}.load" for owner in ("torch", "np", "numpy", "joblib", "yaml")}
FORBIDDEN_FUNCTIONS |= {"os.system", "os.popen"}
FORBIDDEN_ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code"}


def offences(path: Path) -> list[str]:
    """Everything in a module that could run what a file holds, or write where an archive wants."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                found += [item.name for item in node.names if item.name.split(".")[0] in FORBIDDEN_MODULES]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_MODULES:
                found.append(module)
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_NAMES:
                found.append(name)
            case ast.Call(func=ast.Attribute(attr=name, value=owner)):
                function = f"{getattr(owner, 'id', '')}.{name}"
                if name in FORBIDDEN_METHODS or function in FORBIDDEN_FUNCTIONS:
                    found.append(function)
            case ast.keyword(arg=name, value=value) if name in FORBIDDEN_ARGUMENTS:
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(name)
    return [f"{path.name}: {what}" for what in found]


def test_nothing_in_the_data_path_runs_what_files_hold() -> None:
    modules = sorted(DATA.rglob("*.py"))
    assert len(modules) > 40
    assert [offence for path in modules for offence in offences(path)] == []


CODE = [
    "import pickle",
    "from dill import loads",
    "torch.load(p)",
    "eval(x)",
    "t.extractall(p)",
    "f(allow_pickle=1)",
]


@pytest.mark.parametrize("code", CODE)
def test_what_runs_code_is_found(tmp_path: Path, code: str) -> None:
    (tmp_path / "a.py").write_text(code)
    assert len(offences(tmp_path / "a.py")) == 1


def test_a_pickle_is_no_chunk_of_a_cache(tmp_path: Path) -> None:
    import torch

    torch.save({"video-0": torch.zeros(2)}, tmp_path / "chunk-000000.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        open_chunk(tmp_path / "chunk-000000.safetensors")
