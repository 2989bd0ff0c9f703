"""Models by name: ``hf:org/repo[@revision][:what]`` is a GGUF file of a repository on the Hugging Face hub.

``what`` is a quantisation (``Q4_K_M``, in any case) or a file's name. A copy in the hub's cache is used without asking
the hub; anything else is the only thing in this package that touches the network. Listing, addresses, credentials and
errors are ``huggingface_hub``'s, and so is the layout of the cache, so other programs find what was downloaded. The
bytes are received here: the library drops an unfinished download when its process ends and compares no hash.
docs/names.md is the manual. The file is long because choosing, fetching and removing share what a cached model is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from pyengine.errors import EngineError, FileError, FormatError, InvalidArgument, UnsupportedError

if TYPE_CHECKING:
    from types import ModuleType

Progress = Callable[[str, int, int], object]
"""Called with what is being done ("downloading m.gguf"), bytes done and bytes in all."""

PREFIX = "hf:"
DEFAULT = "Q4_K_M"
# What stands in for it, best first: sizes near it, then what is better and larger, then what is worse.
_PREFERENCE = (
    *(DEFAULT, "UD-Q4_K_XL", "Q4_K_L", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0", "MXFP4", "MXFP4_MOE"),
    *("Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q6_K", "Q8_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "BF16", "F16", "F32", "Q2_K"),
)
_QUANTISATION = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d_(?:K(?:_(?:XXS|XS|S|M|L|XL))?|[01](?:_\d_\d)?|XXS|XS|S|M|NL)|TQ[12]_0|MXFP4(?:_MOE)?|"
    r"B?F16|F32))(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
_NOT_MODELS = re.compile(r"(?:^|/)(?:mmproj|[^/]*imatrix)[^/]*\.gguf$", re.IGNORECASE)  # projectors, matrices
_NAME = re.compile(r"hf:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./+-]+))?(?::(.+))?", re.ASCII | re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # SHA-256 of a large file; of a small one git's SHA-1

_CHUNK = 1 << 20
_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before trying again, as long as nothing arrives
_LIST_TIMEOUT = 15.0  # seconds until a silent hub counts as unreachable
# A header is read in growing beginnings: those of 128k vocabularies have 6 to 8 MB. The last is the most that is read.
_HEADER_BYTES = (1 << 20, 8 << 20, 16 << 20, 64 << 20, 256 << 20)
_CONFIG_BYTES = 1 << 20


def is_name(text: object) -> bool:
    """Whether it names a model on the hub; a file of such a name is ``./hf:...``."""
    return isinstance(text, str) and text.startswith(PREFIX)


@dataclass(frozen=True)
class Name:
    """The parts of ``hf:org/repo@revision:what``; ``revision`` and ``what`` are None where they are not given."""

    repo: str
    revision: str | None
    what: str | None

    def __str__(self) -> str:
        return f"{self.repository}{f':{self.what}' if self.what else ''}"

    @property
    def repository(self) -> str:
        """Without ``what``."""
        return f"{PREFIX}{self.repo}{f'@{self.revision}' if self.revision else ''}"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path there, bytes, and hexadecimal hash (see ``_DIGEST``; "" where unknown)."""

    path: str
    size: int
    digest: str = ""


@dataclass(frozen=True)
class Choice:
    """A model of a repository: its parts in order, usually one; ``quantisation`` is "" where none is named."""

    quantisation: str
    parts: tuple[RemoteFile, ...]

    @property
    def path(self) -> str:
        """Of the first part."""
        return self.parts[0].path

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def is_whole(self) -> bool:
        """No part is missing."""
        match = _PART.fullmatch(self.path)
        return match is None or len(self.parts) == int(match[3])


def parse(text: str) -> Name:
    """Reads a name. Errors: ``InvalidArgument`` saying what a name looks like."""
    match = _NAME.fullmatch(text)
    steps = match[2].split("/") if match is not None and match[2] else []
    if match is None or ".." in match[1] or "--" in match[1] or not {"", ".", ".."}.isdisjoint(steps):
        raise InvalidArgument(
            f"{text!r} is no name of a model; expected hf:ORGANISATION/REPOSITORY, then if need be @REVISION and "
            ":QUANTISATION or :FILE, as in hf:org/repo:Q4_K_M",
            code="bad_name",
        )
    return Name(match[1], match[2], match[3])


# --- choosing ---------------------------------------------------------------------------------------------------------


def choices(files: Iterable[RemoteFile]) -> list[Choice]:
    """The models among the files of a repository, by path; the parts of a split one together."""
    groups: dict[tuple[str, str], list[RemoteFile]] = {}
    for file in sorted(files, key=lambda f: f.path):
        if file.path.lower().endswith(".gguf") and not _NOT_MODELS.search(file.path):
            match = _PART.fullmatch(file.path)
            groups.setdefault((match[1], match[3]) if match else (file.path, ""), []).append(file)
    return [Choice(_quantisation(parts[0].path), tuple(parts)) for parts in groups.values()]


def _quantisation(path: str) -> str:
    """The one that the file's name, else its folder's, ends with."""
    for text in (path.rpartition("/")[2], path):
        found = _QUANTISATION.findall(text)
        if found:
            return str(found[-1]).upper()
    return ""


def choose(name: Name, found: Sequence[Choice]) -> tuple[Choice, str]:
    """The model a name means, and a remark where it does not say so itself.

    Errors: ``UnsupportedError`` (there is none at all), ``InvalidArgument`` (none or several fit), ``FormatError``
    (a part is missing).
    """
    if not found:
        raise UnsupportedError(
            f"{name.repository} holds no GGUF file. Others may have converted that model: look for its name with GGUF; "
            "or download it and make one with pyengine-convert",
            code="no_gguf",
        )
    fitting = _fitting(name.what, found) if name.what else _preferred(found)
    if len(fitting) != 1:
        listed = "; ".join(f":{c.quantisation or c.path} ({size_text(c.size)})" for c in found[:20])
        if fitting:
            listed = "; ".join(f":{c.path} ({size_text(c.size)})" for c in fitting[:20])
            problem = f"{len(fitting)} files of {name.repository} fit{f' {name.what!r}' if name.what else ''}"
        else:
            problem = f"no GGUF file of {name.repository} fits {name.what!r}"
        more = "; ..." if len(fitting or found) > 20 else ""
        raise InvalidArgument(
            f"{problem}; {'say which' if fitting else 'there are'} {listed}{more}",
            code="several_files" if fitting else "no_such_file",
        )
    choice = fitting[0]
    if not choice.is_whole:
        raise FormatError(
            f"{name.repository} has {len(choice.parts)} of the parts of {choice.path}: it is not complete there",
            code="split_part_missing",
        )
    remark = ""
    if name.what is None and choice.quantisation != DEFAULT:
        remark = f"{name.repository} has no {DEFAULT}: {choice.quantisation or choice.path} is taken"
    return choice, remark


def _fitting(what: str, found: Sequence[Choice]) -> list[Choice]:
    """By file name, else by quantisation, else by a word of the file's name; in any case."""
    wanted = what.casefold()
    plain = wanted.replace("-", "_")
    for fits in (
        lambda c: any(wanted == p.path.casefold() for p in c.parts),
        lambda c: any(wanted == p.path.casefold().rpartition("/")[2] for p in c.parts),
        lambda c: c.quantisation.casefold() in (wanted, plain),
        lambda c: c.quantisation.casefold() in (f"ud-{wanted}", f"ud-{plain}"),
        lambda c: re.search(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9])", c.path.casefold()),
    ):
        fitting = [choice for choice in found if fits(choice)]
        if fitting:
            return fitting
    return []


def _preferred(found: Sequence[Choice]) -> list[Choice]:
    for quantisation in _PREFERENCE:
        fitting = [choice for choice in found if choice.quantisation == quantisation]
        if fitting:
            return fitting
    return list(found)


# --- the library, the hub's answers, the cache ------------------------------------------------------------------------


def _library() -> ModuleType:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise UnsupportedError(
            "models by name need the package huggingface_hub: pip install 'pyengine[hub]'", code="needs_hub"
        ) from None
    # Without this the library looks for programs that drive it, asks the hub about them, and reports what it found.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    return huggingface_hub


def _version() -> str:
    from pyengine import __version__

    return __version__


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a broken, refused or silent connection raises: httpx's errors, whatever that package is called today."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)


@contextlib.contextmanager
def _in_words(name: Name) -> Iterator[None]:
    """The library's errors as ours, one sentence each."""
    from huggingface_hub import constants, errors

    host = constants.ENDPOINT.partition("://")[2] or constants.ENDPOINT
    login = "'hf auth login' (or HF_TOKEN) with an account that may"

    def fail(message: str, code: str, cause: Exception) -> NoReturn:
        raise FileError(message, code=code) from cause

    try:
        yield
    except EngineError:
        raise
    except errors.OfflineModeIsEnabled as error:
        fail(
            f"{name} is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids asking the hub",
            "hub_offline",
            error,
        )
    except errors.GatedRepoError as error:
        fail(
            f"{name.repo} is gated: accept its terms at {constants.ENDPOINT}/{name.repo}, then log in: {login}",
            "gated",
            error,
        )
    except errors.RevisionNotFoundError as error:
        fail(f"{name.repo} has no revision {name.revision!r}", "unknown_revision", error)
    except errors.RepositoryNotFoundError as error:
        fail(
            f"{host} knows no repository {name.repo}; if it is a private one, log in: {login}",
            "unknown_repository",
            error,
        )
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            said = error.response.headers.get("X-Error-Message") or "no reason given"
            fail(f"{host} refuses {name} ({status}: {said[:200]}): log in: {login}", "hub_refused", error)
        fail(f"{host} answered {status} for {name}: try again later", "hub_failed", error)
    except _transport_errors() as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        fail(
            f"{host} cannot be reached ({reason}), and {name} is not in the cache ({constants.HF_HUB_CACHE})",
            "hub_unreachable",
            error,
        )


_UNREACHABLE = ("hub_offline", "hub_unreachable", "hub_failed")


@dataclass(frozen=True)
class _Listing:
    commit: str
    files: tuple[RemoteFile, ...]


def _list(name: Name) -> _Listing:
    """What the hub says the repository holds."""
    from huggingface_hub import HfApi

    with _in_words(name):
        try:
            info = HfApi(library_name="pyengine", library_version=_version()).model_info(
                name.repo, revision=name.revision, files_metadata=True, timeout=_LIST_TIMEOUT
            )
            files = [_remote_file(s.rfilename, s.size, s.lfs, s.blob_id) for s in info.siblings or ()]
            commit = str(info.sha)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, (EngineError, *_transport_errors())):
                raise
            raise _no_listing(name, type(error).__name__) from error
    if not _COMMIT.fullmatch(commit):
        raise _no_listing(name, f"the commit {commit[:60]!r}")
    return _Listing(commit, tuple(file for file in files if file is not None))


def _no_listing(name: Name, found: str) -> FormatError:
    return FormatError(
        f"what the hub answered for {name.repository} is no listing of a repository ({found}): is there a proxy or a "
        "login page in between?",
        code="bad_listing",
    )


def _remote_file(path: str, size: int | None, lfs: Any, blob: str | None) -> RemoteFile | None:
    """None for a file that no name can mean: without a size or a hash, or with a path that leaves its folder."""
    digest = str(lfs["sha256"] if isinstance(lfs, dict) else lfs.sha256) if lfs else blob or ""
    safe = all(step not in ("", ".", "..") for step in path.split("/")) and not re.search(r"[\\\0:]", path)
    if not safe or not isinstance(size, int) or size < 0 or not _DIGEST.fullmatch(digest):
        return None
    return RemoteFile(path, size, digest)


def cache_folder() -> Path:
    """Where models by name are kept: the hub's own cache (``HF_HOME``, ``HF_HUB_CACHE``)."""
    _library()
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _repository_folder(repo: str) -> Path:
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def _snapshot(name: Name) -> Path | None:
    """The cached files of the revision; None when there are none."""
    folder = _repository_folder(name.repo)
    revision = name.revision or "main"
    commit = revision
    with contextlib.suppress(OSError, UnicodeDecodeError):
        commit = (folder / "refs" / revision).read_text().strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def _cached_choices(snapshot: Path | None) -> list[Choice]:
    """The whole models among the cached files."""
    if snapshot is None:
        return []
    files = []
    for path in sorted(snapshot.rglob("*")):
        with contextlib.suppress(OSError):  # a link whose blob is gone
            if path.is_file():
                files.append(RemoteFile(path.relative_to(snapshot).as_posix(), path.stat().st_size))
    return [choice for choice in choices(files) if choice.is_whole]


# --- fetching ---------------------------------------------------------------------------------------------------------


def fetch(
    name: str, *, progress: Progress | None = None, note: Callable[[str], object] | None = None, local: bool = False
) -> Path:
    """The path of a model's file (the first part of a split one), downloaded where the cache does not hold it.

    Args:
        name: ``hf:org/repo[@revision][:what]``. Without ``what``: Q4_K_M, else what comes closest.
        progress: see :data:`Progress`; an exception it raises ends the download, which a later call goes on with.
        note: called with a sentence where something else happens than the name says.
        local: never ask the hub.

    Errors: ``InvalidArgument`` (the name, or several files fit it), ``UnsupportedError`` (the extra ``hub`` is missing,
    or there is no GGUF file), ``FileError`` (unknown, gated, unreachable, no space, damaged on the way).
    """
    wanted = parse(name)
    _library()
    note = note or (lambda sentence: None)
    snapshot = _snapshot(wanted)
    held = _cached_choices(snapshot)
    if snapshot is not None and (choice := _meant(wanted, held)) is not None:
        return snapshot / choice.path
    try:
        if local:
            raise FileError(f"{wanted} is not in the cache ({cache_folder()})", code="not_cached")
        listing = _list(wanted)
    except FileError as error:
        if snapshot is None or error.code not in (*_UNREACHABLE, "not_cached"):
            raise
        try:
            choice, remark = choose(wanted, held)
        except EngineError:
            raise error from None
        note(f"{choice.path} is taken from the cache; the hub was not reached")
        return snapshot / choice.path
    choice, remark = choose(wanted, choices(listing.files))
    if remark:
        note(remark)
    return _download(wanted, listing.commit, choice, progress or (lambda what, done, total: None), note)


def _meant(name: Name, held: Sequence[Choice]) -> Choice | None:
    """What a name means beyond doubt, whatever else the repository may hold."""
    try:
        choice, remark = choose(name, held)
    except EngineError:
        return None
    return None if remark else choice


def _download(name: Name, commit: str, choice: Choice, progress: Progress, note: Callable[[str], object]) -> Path:
    folder = _repository_folder(name.repo)
    snapshot = folder / "snapshots" / commit
    missing = [part for part in choice.parts if not (snapshot / part.path).exists()]
    try:
        _check_space(folder, missing)
        if missing:
            note(f"downloading {choice.path}, {size_text(choice.size)}, to {cache_folder()}")
        before = choice.size - sum(part.size for part in missing)
        for part in missing:

            def report(what: str, done: int, part: RemoteFile = part, before: int = before) -> None:
                progress(f"{what} {part.path}", before + done, choice.size)

            blob = folder / "blobs" / part.digest
            if not blob.exists():
                _receive_part(name, commit, part, blob, report)
            _link(blob, snapshot / part.path)
            before += part.size
        if not _COMMIT.fullmatch(name.revision or "main"):
            ref = folder / "refs" / (name.revision or "main")
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write to {folder}: {error.strerror or error}", code="cannot_write") from error
    return snapshot / choice.path


def _check_space(folder: Path, parts: Sequence[RemoteFile]) -> None:
    needed = 0
    for part in parts:
        blob = folder / "blobs" / part.digest
        if not blob.exists():
            unfinished = _unfinished(blob)
            needed += part.size - (unfinished.stat().st_size if unfinished.exists() else 0)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise FileError(
            f"{existing} has {size_text(free)} free; the download needs {size_text(needed)} "
            "(HF_HUB_CACHE names another folder; pyengine-run rm NAME makes room)",
            code="no_space",
        )


def _unfinished(blob: Path) -> Path:
    return blob.with_name(blob.name + ".incomplete")


def _receive_part(name: Name, commit: str, part: RemoteFile, blob: Path, report: Callable[[str, int], object]) -> None:
    """A blob that is complete and has the right hash, or an error; an unfinished one is gone on with."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import WeakFileLock

    lock = blob.parent.parent.parent / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(blob)
    with WeakFileLock(lock), _tidied(unfinished):  # of the library, so that its downloads of the same file wait, too
        if blob.exists():
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        with open(unfinished, "r+b") as file:
            url = hf_hub_url(name.repo, part.path, revision=commit)
            with _in_words(name):
                _receive(url, file, part, lambda done: report("downloading", done))
            file.flush()
            os.fsync(file.fileno())
            found = _digest(file, part, lambda done: report("checking", done))
        if found != part.digest:
            unfinished.unlink()
            raise FileError(
                f"{part.path} was damaged on the way: its hash is {found[:12]}..., expected {part.digest[:12]}...; "
                "it was removed: download it again",
                code="damaged_download",
            )
        os.replace(unfinished, blob)


@contextlib.contextmanager
def _tidied(unfinished: Path) -> Iterator[None]:
    """Leaves nothing of a download of which nothing came."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if unfinished.exists() and unfinished.stat().st_size == 0:
                unfinished.unlink()
            unfinished.parent.rmdir()  # succeeds for empty folders only
            unfinished.parent.parent.rmdir()


def _receive(url: str, file: BinaryIO, part: RemoteFile, report: Callable[[int], object]) -> None:
    """Appends to ``file`` what is missing, trying again as long as something arrives.

    The address is the hub's own each time, which redirects to wherever the bytes lie: those addresses expire.
    """
    failures = 0
    have = file.seek(0, os.SEEK_END)
    if have > part.size:
        have = 0
    report(have)
    while have < part.size:
        before = have
        try:
            with _stream(url, f"bytes={have}-") as response:
                if _starts_at(response) != have:  # the server sends all of it again
                    have = 0
                file.seek(have)
                file.truncate()
                for chunk in response.iter_bytes():  # as they come: one that waits to be full is lost in a break
                    if have + len(chunk) > part.size:
                        raise FileError(
                            f"{part.path} is longer than the {part.size} bytes that the hub announced",
                            code="damaged_download",
                        )
                    have += file.write(chunk)
                    report(have)
        except _transport_errors() as error:
            if _status(error) == 416 and have:  # nothing comes after what is here
                raise _too_short(part, have) from error
            if _status(error) not in (0, 408, 429) and _status(error) < 500:
                raise
            failures = 0 if have > before else failures + 1
            if failures > len(_WAITS):
                raise
            time.sleep(_WAITS[max(failures - 1, 0)])
        else:
            failures = 0 if have > before else failures + 1
            if failures > len(_WAITS):
                raise _too_short(part, have)


def _status(error: Exception) -> int:
    """Of the answer; 0 where none came."""
    response = getattr(error, "response", None)
    return 0 if response is None else int(response.status_code)


def _too_short(part: RemoteFile, have: int) -> FileError:
    return FileError(
        f"{part.path} ends after {have} of the {part.size} bytes that the hub announced", code="damaged_download"
    )


@contextlib.contextmanager
def _stream(url: str, byte_range: str) -> Iterator[Any]:
    """A response of the library's session, with its credentials, which it keeps from other hosts."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = build_hf_headers(library_name="pyengine", library_version=_version())
    headers |= {"Accept-Encoding": "identity", "Range": byte_range}
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        yield response


def _starts_at(response: Any) -> int:
    """The byte of the file that a response begins with."""
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if response.status_code == 206 and match else 0


def _digest(file: BinaryIO, part: RemoteFile, report: Callable[[int], object]) -> str:
    """The hash of the file, of the kind that was announced."""
    if len(part.digest) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % part.size, usedforsecurity=False)
    done = file.seek(0)
    while chunk := file.read(4 * _CHUNK):
        digest.update(chunk)
        done += len(chunk)
        report(done)
    return digest.hexdigest()


def _link(blob: Path, pointer: Path) -> None:
    """The blob under its name, as the cache has it: a relative link; the file itself where links are not allowed."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if not pointer.exists():
        pointer.unlink(missing_ok=True)  # a link to a blob that is gone
    with contextlib.suppress(FileExistsError):
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except FileExistsError:
            raise
        except OSError:
            os.replace(blob, pointer)


# --- a look before the download ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def outline(
    name: str, *, progress: Progress | None = None, note: Callable[[str], object] | None = None
) -> Iterator[Path]:
    """What a plan needs of a model that is not here: a GGUF file (with all its parts) whose header is the model's and
    whose weights are a hole in the file; where the repository has no GGUF file, its ``config.json``. Gone after the
    ``with`` block. A copy in the cache is used as it is. At most 256 MiB are read; usually 1 to 8 MiB.

    Args, errors: as :func:`fetch`.
    """
    wanted = parse(name)
    _library()
    note = note or (lambda sentence: None)
    report = progress or (lambda what, done, total: None)
    snapshot = _snapshot(wanted)
    held = _cached_choices(snapshot)
    if snapshot is not None and (choice := _meant(wanted, held)) is not None:
        yield snapshot / choice.path
        return
    try:
        listing = _list(wanted)
    except FileError as error:
        if error.code not in _UNREACHABLE:
            raise
        yield fetch(name, note=note, local=True) if held else _raise(error)
        return
    with tempfile.TemporaryDirectory(prefix="pyengine-") as scratch:
        found = choices(listing.files)
        config = next((file for file in listing.files if file.path == "config.json"), None)
        if not found and config is not None and wanted.what is None:
            path = Path(scratch) / wanted.repo.rpartition("/")[2] / "config.json"
            path.parent.mkdir()
            path.write_bytes(_beginning(wanted, listing.commit, config, _CONFIG_BYTES, b""))
            note(f"{wanted.repository} holds no GGUF file: this is from its config.json")
            yield path
            return
        choice, remark = choose(wanted, found)
        if remark:
            note(remark)
        read = 0
        for part in choice.parts:
            path = Path(scratch) / part.path.rpartition("/")[2]
            read += _write_outline(wanted, listing.commit, part, path, report)
        note(f"{choice.path}, {size_text(choice.size)}: {size_text(read)} of it were read")
        yield Path(scratch) / choice.path.rpartition("/")[2]


def _raise(error: Exception) -> NoReturn:
    raise error


def _write_outline(name: Name, commit: str, part: RemoteFile, path: Path, report: Progress) -> int:
    """Writes the header and a hole; returns how many bytes were read. The engine's reader says when it is whole."""
    from pyengine.gguf_file import GgufFile

    data = b""
    for limit in _HEADER_BYTES:
        report(f"reading the header of {part.path}", len(data), min(limit, part.size))
        data = _beginning(name, commit, part, min(limit, part.size), data)
        path.write_bytes(data)
        try:
            GgufFile.open(path, load="header").close()
        except EngineError as error:
            if error.code in _CUT and len(data) < part.size:
                continue
            if error.code not in _WHOLE:
                raise
        os.truncate(path, part.size)
        return len(data)
    raise UnsupportedError(
        f"the header of {part.path} is longer than {size_text(_HEADER_BYTES[-1])}: nothing plans for that",
        code="header_too_long",
    )


_CUT = ("truncated_header",)
# What the reader says of a whole header without its weights, or without the other parts of the model.
_WHOLE = ("truncated_data", "tensor_past_end", "split_part_missing", "split_not_first")


def _beginning(name: Name, commit: str, file: RemoteFile, size: int, have: bytes) -> bytes:
    """The first ``size`` bytes of a remote file (all of a shorter one), of which some may be here already."""
    from huggingface_hub import hf_hub_url

    size = min(size, file.size)
    if len(have) >= size:
        return have[:size]
    url = hf_hub_url(name.repo, file.path, revision=commit)
    with _in_words(name), _stream(url, f"bytes={len(have)}-{size - 1}") as response:
        data = bytearray(have[: _starts_at(response)])
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= size:  # a server that knows no ranges would go on
                break
    if len(data) < size:
        raise _too_short(file, len(data))
    return bytes(data[:size])


# --- what the cache holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cached:
    """A model in the cache.

    Attributes:
        name: by which it can be asked for again; repo: ``org/repo``.
        revision: commit; ``refs``: the names that stand for it.
        path: of the first part.
        used: seconds since the epoch of the last read, as far as the file system notes it.
        choice: quantisation, parts, sizes.
    """

    name: str
    repo: str
    revision: str
    refs: tuple[str, ...]
    path: Path
    used: float
    choice: Choice


@dataclass(frozen=True)
class Unfinished:
    """Downloads of a repository that were not finished: the next one goes on with them."""

    repo: str
    size: int
    paths: tuple[Path, ...]


def cached() -> tuple[list[Cached], list[Unfinished]]:
    """The GGUF models in the cache, and unfinished downloads, by name."""
    models: list[Cached] = []
    unfinished: list[Unfinished] = []
    root = cache_folder()
    for folder in sorted(root.glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        try:
            models += _cached_in(folder, repo)
            parts = tuple(sorted((folder / "blobs").glob("*.incomplete")))
            if parts:
                unfinished.append(Unfinished(repo, sum(part.stat().st_size for part in parts), parts))
        except OSError as error:
            raise FileError(f"cannot read {folder}: {error.strerror or error}", code="cannot_read") from error
    return models, unfinished


def _cached_in(folder: Path, repo: str) -> Iterator[Cached]:
    refs: dict[str, list[str]] = {}
    for ref in sorted((folder / "refs").rglob("*")):
        if ref.is_file():
            refs.setdefault(ref.read_text(errors="replace").strip(), []).append(
                ref.relative_to(folder / "refs").as_posix()
            )
    for snapshot in sorted((folder / "snapshots").glob("*")):
        names = tuple(refs.get(snapshot.name, ()))
        found = _cached_choices(snapshot)
        revision = None if "main" in names else names[0] if names else snapshot.name
        for choice in found:
            several = [c.quantisation for c in found].count(choice.quantisation) > 1
            what = choice.path if several or not choice.quantisation else choice.quantisation
            path = snapshot / choice.path
            used = max((snapshot / part.path).stat().st_atime for part in choice.parts)
            yield Cached(str(Name(repo, revision, what)), repo, snapshot.name, names, path, used, choice)


def find_cached(name: str) -> list[Cached]:
    """The models in the cache that a name means: all of a repository's without ``what``. May be none."""
    wanted = parse(name)
    revision = wanted.revision
    here = [
        model
        for model in cached()[0]
        if model.repo.casefold() == wanted.repo.casefold()
        and (revision is None or revision in model.refs or revision == model.revision)
    ]
    if wanted.what is None:
        return here
    fitting = _fitting(wanted.what, [model.choice for model in here])
    return [model for model in here if any(model.choice is choice for choice in fitting)]


def check(model: Cached, progress: Progress | None = None) -> bool | None:
    """Reads all of a cached model and compares its hashes; None where the cache does not know them (no links)."""
    good = True
    for part in model.choice.parts:
        path = _file_of(model, part)
        digest = path.resolve().name
        if not _DIGEST.fullmatch(digest):
            return None

        def report(done: int, part: RemoteFile = part) -> None:
            if progress is not None:
                progress(f"checking {part.path}", done, part.size)

        with open(path, "rb") as file:
            good = _digest(file, RemoteFile(part.path, part.size, digest), report) == digest and good
    return good


def _file_of(model: Cached, part: RemoteFile) -> Path:
    snapshot = model.path.parents[len(Path(model.choice.path).parts) - 1]
    return snapshot / part.path


def remove(models: Sequence[Cached], unfinished: Sequence[Unfinished] = ()) -> int:
    """Removes models and unfinished downloads from the cache; returns the bytes that this frees.

    What another revision or model shares stays.
    """
    freed = 0
    folders = set()
    try:
        for left in (path for found in unfinished for path in found.paths):
            freed += left.stat().st_size
            left.unlink()
            folders.add(left.parent.parent)
        for model in models:
            snapshot = model.path.parents[len(Path(model.choice.path).parts) - 1]
            folder = snapshot.parents[1]
            folders.add(folder)
            for part in model.choice.parts:
                pointer = snapshot / part.path
                blob = pointer.resolve()
                freed += _remove_file(pointer, blob, folder)
        for folder in folders:
            _remove_empty(folder)
    except OSError as error:
        raise FileError(f"cannot remove {error.filename}: {error.strerror or error}", code="cannot_write") from error
    return freed


def _remove_file(pointer: Path, blob: Path, folder: Path) -> int:
    size = pointer.stat().st_size
    is_link = pointer.is_symlink()
    pointer.unlink()
    if not is_link:
        return size
    if any(other.is_symlink() and other.resolve() == blob for other in (folder / "snapshots").rglob("*")):
        return 0
    if blob.parent == folder.resolve() / "blobs":  # never anything outside
        blob.unlink(missing_ok=True)
        return size
    return 0


def _remove_empty(folder: Path) -> None:
    """Snapshots without files, names of snapshots that are gone, and a repository without anything."""
    for path in sorted((folder / "snapshots").rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for ref in (folder / "refs").rglob("*"):
        if ref.is_file() and not (folder / "snapshots" / ref.read_text(errors="replace").strip()).is_dir():
            ref.unlink()
    if not any(path.is_file() or path.is_symlink() for path in folder.rglob("*")):
        shutil.rmtree(folder)


def size_text(n: int) -> str:
    """Bytes as shops and hubs count them: ``4.92 GB``."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            value = n / factor
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    return f"{n} B"
