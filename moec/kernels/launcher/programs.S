/* The programs of all sizes, one after another, as data of the library. */
    .section .rodata
    .balign 64
    .globl moec_programs
    .hidden moec_programs
moec_programs:
    .incbin "programs.bin"
    .globl moec_programs_end
    .hidden moec_programs_end
moec_programs_end:
    .section .note.GNU-stack,"",%progbits  /* the stack is not executable */
