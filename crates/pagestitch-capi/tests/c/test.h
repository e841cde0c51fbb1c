/* Checks of the C tests. */
#include <pagestitch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
        if (status_ != (status) || !strstr(ps_last_error(), word)) {                                       \
            fprintf(stderr, "%s:%d: %d, \"%s\" has no \"%s\"\n", __FILE__, __LINE__, status_, ps_last_error(), word); \
            exit(1);                                                                                       \
        }                                                                                                  \
    } while (0)
