"""`quantkit plugins`."""

import typer

from quantkit.cli import options


def plugins(as_json: options.AsJson = False) -> None:
    """List every calibration method, format and target, and what keeps a plug-in from loading.

    Kind "statistics" is what reduces tensors: native, or numpy where no C compiler was at hand to install it.
    """
    from quantkit.calibrators import list_calibrators
    from quantkit.export import list_emitters
    from quantkit.formats import list_formats
    from quantkit.statistics import NATIVE
    from quantkit.tables import Table

    found = {"method": list_calibrators(), "format": list_formats(), "target": list_emitters()}
    found["statistics"] = {"native" if NATIVE else "numpy": ""}
    if as_json:
        options.print_json(found)
        return
    rows = [(kind, name, error) for kind, names in found.items() for name, error in names.items()]
    typer.echo(Table(("kind", "name", "error"), rows).text())
