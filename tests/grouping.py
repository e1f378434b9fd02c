"""The order of tests: those that run the same programs stand together, in one process.

JAX compiles a program for each flow and shape. The laws of one case share their programs, so they
run one after the other, in one process.
"""


def group_of(item):
    """Name the group of a test: its case or, where it has none, its file; and its wing."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    subject = parameters.get("case")
    wings = {str(parameters[name]) for name in ("wing", "writer") if name in parameters}
    # Where both wings take part, NumPyro's programs are what costs time; its name sorts first.
    return f"{item.path.stem if subject is None else subject} {min(wings, default='')}"


def is_of_a_case(item):
    """Whether a test is one of the laws of a case."""
    return hasattr(item, "callspec") and "case" in item.callspec.params
