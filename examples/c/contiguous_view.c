/* "I have non-contiguous chunks of memory; can I make them appear contiguous, at another address, without a copy?"
 * A page is copied when it is first touched, and only then. three_answers.c has ways without any copy.
 *
 *   cargo build --release -p pagestitch-capi
 *   gcc -Icrates/pagestitch-capi/include examples/c/contiguous_view.c target/release/libpagestitch_capi.a -lm -o view && ./view */
#include <pagestitch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void) {
    ps_piece pieces[3];
    for (int i = 0; i < 3; i++) {
        char *mem = (char *)malloc(10000);
        size_t len = 10000 - (size_t)i;
        memset(mem, 'a' + i, len);
        pieces[i].start = mem;
        pieces[i].bytes = len;
    }
    ps_server *server;
    ps_region *region;
    if (ps_server_best(&server) || ps_region_of_pieces(server, pieces, 3, &region)) {
        fprintf(stderr, "%s\n", ps_last_error());
        return 1;
    }
    const char *base = (const char *)ps_region_data(region);
    printf("%zu bytes: %c%c%c%c\n", ps_region_bytes(region), base[0], base[9999], base[10000], base[29996]);
    ps_region_free(region);
    ps_server_free(server);
    for (int i = 0; i < 3; i++)
        free((void *)pieces[i].start);
    return 0;
}
