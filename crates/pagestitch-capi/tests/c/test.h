/* Checks of the C tests. */
#include <pagestitch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Texts name calls of C, and not those of Rust. */
static inline int has_names_of_c(const char *text) {
    for (const char *call = text; (call = strstr(call, "()")); call += 2) {
        const char *name = call;
        while (name > text && (name[-1] == '_' || name[-1] == ':' || (name[-1] >= 'a' && name[-1] <= 'z')))
            name--;
        if (strncmp(name, "ps_", 3) && strncmp(name, "memmove", 7)) {
            fprintf(stderr, "\"%s\" names a call that C lacks\n", text);
            return 0;
        }
    }
    return 1;
}

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                  \
        }                                                                             \
    } while (0)
#define OK(call)                                                                                \
    do {                                                                                        \
        int status_ = (call);                                                                   \
        if (status_) {                                                                          \
            fprintf(stderr, "%s:%d: %d: %s\n", __FILE__, __LINE__, status_, ps_last_error());   \
            exit(1);                                                                            \
        }                                                                                       \
    } while (0)
/* The call fails with this status, and a line that has this word. */
#define FAILS(call, status, word)                                                                          \
    do {                                                                                                   \
        int status_ = (call);                                                                              \
        if (status_ != (status) || !strstr(ps_last_error(), word) || !has_names_of_c(ps_last_error())) {                                       \
            fprintf(stderr, "%s:%d: %d, \"%s\" has no \"%s\"\n", __FILE__, __LINE__, status_, ps_last_error(), word); \
            exit(1);                                                                                       \
        }                                                                                                  \
    } while (0)
