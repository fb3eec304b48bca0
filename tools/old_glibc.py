"""Stand-ins for the C and C++ libraries of an older Linux, to link against: what they lack cannot be used by accident.

    python tools/old_glibc.py FOLDER        writes them there and says what they offer

A module that was linked on a new Linux asks for the newest version of every library function, and an older Linux refuses to
load it. For each library here, an empty one of the same name is made which offers every function in the newest version not
above manylinux_2_28's; the linker then writes those versions into our module. Nothing is copied from the libraries but
names. FASTLOSS_GLIBC=2.28 makes tools/build_native.py link this way; the images of manylinux need none of it.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

# The newest version of each kind that manylinux_2_28 allows (PEP 600; auditwheel checks the finished wheel).
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
LOADER = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}.get(platform.machine(), "")
LIBRARIES = ("libc.so.6", "libm.so.6", "libstdc++.so.6", *filter(None, [LOADER]))
# Until glibc 2.34 these were libraries of their own; a function that moved has a version above 2.28 in libc and begins so.
MOVED = {
    "libpthread.so.0": ("pthread_", "sem_"),
    "libdl.so.2": ("dl",),
    "librt.so.1": ("shm_", "mq_", "timer_", "aio_", "lio_"),
}
SYMBOL = re.compile(
    r"^\s*\d+: \S+\s+\S+\s+(FUNC|IFUNC|OBJECT|TLS)\s+(?:GLOBAL|WEAK|UNIQUE)\s+DEFAULT\s+(?!UND)\S+\s+(\S+?)(@@?)(\S+)", re.M
)  # fmt: skip
# What the headers of a newer GCC ask for and glibc 2.28 has not: "there may be other threads" is always true.
MISSING = (
    '.section .data\n.globl __libc_single_threaded\n.hidden __libc_single_threaded\n'
    ".type __libc_single_threaded,@object\n.size __libc_single_threaded,1\n__libc_single_threaded: .byte 0\n"
    '.section .note.GNU-stack,"",@progbits\n'
)  # fmt: skip


def version(text: str) -> tuple[str, tuple[int, ...]] | None:
    """("GLIBC", (2, 2, 5)) of "GLIBC_2.2.5"; None for a version without numbers (GLIBC_PRIVATE)."""
    match = re.fullmatch(r"(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)*)", text)
    return (match[1], tuple(map(int, match[2].split(".")))) if match else None


def offered(listing: str) -> dict[str, dict[str, tuple[str, str]]]:
    """From readelf's list of a library's symbols: library (or "" for this one) -> symbol -> (kind, version)."""
    best: dict[str, tuple[tuple[int, ...], str, str]] = {}
    moved: set[str] = set()
    for kind, name, at, text in SYMBOL.findall(listing):
        parsed = version(text)
        if parsed is None:
            continue
        if parsed[1] > NEWEST[parsed[0]]:
            if at == "@@":
                moved.add(name)
        elif name not in best or parsed[1] > best[name][0]:
            best[name] = (parsed[1], "TLS" if kind == "TLS" else kind, text)
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for name, (_, kind, text) in best.items():
        home = ""
        if name in moved and text.startswith("GLIBC_"):
            home = next((library for library, starts in MOVED.items() if name.startswith(starts)), "")
        found.setdefault(home, {})[name] = (kind, text)
    return found


def assembly(symbols: dict[str, tuple[str, str]]) -> str:
    lines = []
    for number, (name, (kind, text)) in enumerate(sorted(symbols.items())):
        section, what = {
            "TLS": ('.section .tbss,"awT",@nobits', "tls_object"),
            "OBJECT": (".data", "object"),
        }.get(kind, (".text", "function"))
        stub = f"stub{number}"
        lines += [section, f".globl {stub}", f".type {stub},@{what}", f"{stub}: .skip 8", f".size {stub},8"]
        lines.append(f".symver {stub},{name}@@{text}")
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def make(cxx: list[str], folder: Path) -> list[str]:
    """Writes the stand-ins into ``folder``; returns what the link command needs in place of the compiler's own libraries."""
    folder.mkdir(parents=True, exist_ok=True)
    stubs: dict[str, dict[str, tuple[str, str]]] = {}
    for library in LIBRARIES:
        path = _run([*cxx, f"-print-file-name={library}"]).strip()
        for home, symbols in offered(_run(["readelf", "--wide", "--dyn-syms", path])).items():
            stubs.setdefault(home or library, {}).update(symbols)
    for library, symbols in stubs.items():
        source, script = folder / f"{library}.s", folder / f"{library}.map"
        source.write_text(assembly(symbols))
        versions = sorted({text for _, text in symbols.values()})
        script.write_text("".join(f"{text} {{ }};\n" for text in versions) + "OWN { local: stub*; };\n")
        words = ["-shared", "-nostdlib", f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
        _run([*cxx, *words, str(source), "-o", str(folder / library)])
    (folder / "missing.s").write_text(MISSING)
    _run([*cxx, "-c", str(folder / "missing.s"), "-o", str(folder / "missing.o")])
    # What the older libstdc++ has not comes from the static one, as Red Hat's toolsets do it.
    static, rest = (_run([*cxx, f"-print-file-name={x}.a"]).strip() for x in ("libstdc++", "libc_nonshared"))
    names = ["libpthread.so.0", "libdl.so.2", "librt.so.1", "libm.so.6", "libc.so.6", LOADER]
    return [
        "-nodefaultlibs", str(folder / "missing.o"), "-Wl,--as-needed", str(folder / "libstdc++.so.6"), static,
        *(str(folder / name) for name in names if name in stubs), rest, "-lgcc_s", "-lgcc",
    ]  # fmt: skip


def _run(words: list[str]) -> str:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stdout.strip()}")
    return done.stdout


if __name__ == "__main__":
    print(" ".join(make(["g++"], Path(sys.argv[1]))))
