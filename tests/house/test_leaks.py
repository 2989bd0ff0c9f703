"""Reading what sanitizers report."""

from __future__ import annotations

from tests.house.leaks import findings

OF_PYTHON = """
==7==ERROR: LeakSanitizer: detected memory leaks

Direct leak of 48 byte(s) in 2 object(s) allocated from:
    #0 0x7f1e in __interceptor_malloc ../../../../src/libsanitizer/asan/asan_malloc_linux.cpp:69
    #1 0x7f1e in PyFloat_FromDouble Objects/floatobject.c:149

SUMMARY: AddressSanitizer: 3120 byte(s) leaked in 53 allocation(s).
"""
OF_OURS = """
Indirect leak of 8 byte(s) in 1 object(s) allocated from:
    #0 0x7f1e in operator new(unsigned long) ../../../../src/libsanitizer/asan/asan_new_delete.cpp:99
    #1 0x7f1e in pe::Session::eval csrc/model/session.cc:10
    #2 0x7f1e  (/home/x/build/leaks/libpyengine.so+0x5555)
"""
ERRORS = """
==7==ERROR: AddressSanitizer: heap-use-after-free on address 0x60200000 at pc 0x55 bp 0x7f sp 0x7f
READ of size 1 at 0x60200000 thread T0

csrc/gguf/reader.cc:10:5: runtime error: signed integer overflow: 2147483647 + 1 cannot be represented in type 'int'
"""


def test_leaks_and_errors_of_ours_are_findings_and_what_python_leaves_is_none() -> None:
    assert findings(OF_PYTHON) == []
    assert [record.split(" of ")[0] for record in findings(OF_PYTHON + OF_OURS)] == ["Indirect leak"]
    assert len(findings(ERRORS)) == 2
