"""From a run to a bundle: one graph, several formats, proved equal in a fresh process.

Importing this package makes `gpuops.export` the package, which would hide the function of that name; so the package
itself can be called: `gpuops.export(run, bundle)` works before and after.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuops.export.bundling import export as export

__all__ = ["export"]


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from gpuops.export.bundling import export

        return export(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        if name != "export":
            raise AttributeError(f"module 'gpuops.export' has no attribute {name!r}")
        from gpuops.export.bundling import export

        return export


sys.modules[__name__].__class__ = _CallablePackage
