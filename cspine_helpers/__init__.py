"""Cervical-spine fracture detection on CT: one small package behind the numbered notebooks.

Research software, not a medical device.
"""

__version__ = "0.1.0"


def versions() -> str:
    """What a question should come with: this package, Python, the system, what decides numbers.

    Example:
        >>> versions()  # doctest: +ELLIPSIS
        'cspine_helpers ...; Python ...; torch ..., timm ..., numpy ..., scikit-learn ...'
    """
    import platform
    from importlib.metadata import version

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "numpy", "scikit-learn"))
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return f"cspine_helpers {__version__}; {python}; {libraries}"
