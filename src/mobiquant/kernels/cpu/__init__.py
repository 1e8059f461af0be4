"""The CPU backend: C++ that reads slice planes as they are stored, for AVX-512 with VNNI, AVX2, Arm's dot
products, or any machine.

`library` loads the shared library and mirrors its structures; `product` is the mixed-depth product as a torch operator,
`descent` a block of columns of coordinate descent over codes. The C++ starts in `types.h`; `fields.h` is how bit planes become
codes, `product.h` what is done with them. `docs/cpu.md` says why it is built this way and what was measured.
"""
