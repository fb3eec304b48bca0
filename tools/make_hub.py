"""Writes a kernel package in the layout of the Hugging Face kernel hub, loadable by ``kernels.get_local_kernel``.

    python tools/make_hub.py dist/hub

Two variants of the same Python: ``torch-universal`` with the Triton kernels, which needs no build, and one for this
machine's CPU with the native module of this Python, if it is built. A package of the hub is imported under a name that
nobody knows before, beside an installed fastloss perhaps: absolute imports become relative ones, and the operators of
torch.library get a namespace of their own.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("harness", "bench", "plan", "kernels", "integrations", "cli.py", "cli_*.py", "cli", "__main__.py")
INTEGRATIONS = ("__init__.py", "handle.py", "heads.py", "transformers.py", "kernel_layers.py")
OLDEST_TORCH = "28"  # of the CPU variant: the native module has none of torch's headers
CARD = """---
library_name: kernels
license: apache-2.0
---

# fastloss

Losses for language models: cross-entropy from hidden states, preference and policy-gradient losses, token statistics.

```python
from kernels import get_kernel
fastloss = get_kernel("<this repository>")
loss = fastloss.linear_cross_entropy(hidden, weight, target)
```

Layers: `ForCausalLMLoss` (transformers' loss) and `LinearHead` (the forward of a vocabulary head; its logits are lazy in
training).
"""


def sources() -> dict[Path, Path]:
    """Place in the package → file."""
    package = ROOT / "fastloss"
    found: dict[Path, Path] = {}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if not any(Path(place.parts[0]).match(name) for name in LEFT_OUT):
            found[place] = path
    found.update({Path("integrations") / name: package / "integrations" / name for name in INTEGRATIONS})
    found.update(
        {
            Path("kernels") / p.relative_to(ROOT / "kernels"): p
            for p in sorted((ROOT / "kernels").rglob("*.py"))
        }
    )
    return found


def as_a_part(text: str, place: Path, namespace: str) -> str:
    """The module with relative imports and operators of ``namespace``."""
    dots = "." * len(place.parts)
    text = re.sub(r"(?m)^(\s*)from fastloss\.(\S+) import ", rf"\1from {dots}\2 import ", text)
    text = re.sub(r"(?m)^(\s*)from fastloss import ", rf"\1from {dots} import ", text)
    text = re.sub(
        r"(?m)^(\s*)import fastloss$",
        rf'\1import importlib\n\1fastloss = importlib.import_module("{dots}", __package__)',
        text,
    )
    # Names of modules in strings: those that are imported by name.
    text = re.sub(r'\((f?)"fastloss(\.[^"]*)"\)', rf'(\1"{namespace}\2")', text)
    return text.replace('"fastloss::', f'"{namespace}::').replace(
        "torch.ops.fastloss.", f"torch.ops.{namespace}."
    )


def write_variant(
    folder: Path, files: dict[Path, str], metadata: dict[str, object], native: Path | None
) -> None:
    for place, text in files.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    if native is not None:
        shutil.copy2(native, folder / native.name)
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def make(target: Path) -> list[Path]:
    raw = {place: path.read_text(encoding="utf-8") for place, path in sources().items()}
    digest = hashlib.sha256("".join(f"{p}\0{t}\0" for p, t in sorted(raw.items())).encode()).hexdigest()[:12]
    version = re.search(r'"([^"]+)"', raw[Path("_version.py")])
    assert version is not None
    shutil.rmtree(target, ignore_errors=True)
    native = ROOT / "fastloss" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    variants: dict[str, tuple[str, Path | None]] = {"torch-universal": ("cuda", None)}
    if native.exists():
        variants[f"torch-stable-abi{OLDEST_TORCH}-cpu-{machine}-{platform.system().lower()}"] = (
            "cpu",
            native,
        )
    made = []
    for variant, (backend, module) in variants.items():
        name = f"fastloss_{digest}_{'native' if module else 'universal'}"
        files = {place: as_a_part(text, place, name) for place, text in raw.items()}
        files[Path("__init__.py")] += '\nfrom . import layers  # noqa: E402\n\n__all__ += ["layers"]\n'
        files[Path("layers.py")] = (
            '"""The layers of this kernel package."""\n\n'
            "from .integrations.kernel_layers import ForCausalLMLoss, LinearHead\n\n"
            '__all__ = ["ForCausalLMLoss", "LinearHead"]\n'
        )
        metadata = {
            "id": name,
            "name": "fastloss",
            "version": int(version[1].split(".")[0]) or 1,
            "license": "Apache-2.0",
            "backend": {"type": backend},
            "python-depends": [],
        }
        write_variant(target / "build" / variant, files, metadata, module)
        made.append(target / "build" / variant)
    (target / "README.md").write_text(CARD, encoding="utf-8")
    shutil.copy2(ROOT / "LICENSE", target / "LICENSE")
    return made


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for folder in make(Path(sys.argv[1])):
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        print(f"{folder}: {size / 1e6:.1f} MB")
