"""Every setting of the package: frozen dataclasses, one docstring a field, checked when they are made."""

