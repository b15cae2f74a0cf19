"""What pytest reads first; the fixtures are common.py's."""

import gc


def pytest_configure(config):
    """pytest-xdist's first process only hands out tests: it need not wait for torch."""
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"
    if config.getoption("dist", "no") == "no" or not config.getoption("tx"):
        # What is imported stays: the collector need not look through it again and again.
        gc.disable()
        config.pluginmanager.import_plugin("common")
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    """First the modules that need a run or its start, which take long: all processes end at once.

    And nobody waits for them: of two processes, the second begins with the other modules.
    """
    names = {"warm_start", "finished"}
    long = {item.module for item in items if names & {*item.fixturenames}}
    items.sort(key=lambda item: item.module not in long)
