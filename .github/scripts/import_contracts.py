"""Write the import contracts for import-linter, from the packages found in the tree.

    python .github/scripts/import_contracts.py out/import-contracts.ini

No method package imports another, directly or through a third; tenfold-common imports none.
"""

import sys
from pathlib import Path

import house


def contracts(names: list[str]) -> str:
    """The configuration for these distributions.

    Args:
        names: Names of all packages, tenfold-common among them.

    Returns:
        The text of an import-linter configuration file.
    """
    modules = [house.import_name(name) for name in names]
    common = house.import_name(house.COMMON)
    methods = [module for module in modules if module != common]

    def listed(items: list[str]) -> str:
        return "".join(f"\n    {item}" for item in items)

    text = f"[importlinter]\nroot_packages ={listed(modules)}\n"
    if methods:
        text += (
            "\n[importlinter:contract:siblings]\nname = no package imports a sibling\n"
            f"type = independence\nmodules ={listed(methods)}\n"
        )
    if methods and common in modules:
        text += (
            "\n[importlinter:contract:common]\nname = tenfold-common imports no package\n"
            f"type = forbidden\nsource_modules ={listed([common])}\n"
            f"forbidden_modules ={listed(methods)}\n"
        )
    return text


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if len(argv) != 1:
        print("usage: import_contracts.py FILE", file=sys.stderr)
        return 2
    Path(argv[0]).write_text(contracts(house.packages()), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
