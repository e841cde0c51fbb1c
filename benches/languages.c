/* First touches of a region, as languages.rs makes them in Rust: prints the nanoseconds that they take.
 * Its arguments: "random" or "scan", and the bytes of the region. */
#include <pagestitch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PAGE = 4096, LINE = 64, PIECES = 64 };

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static uint64_t random_touches(const volatile unsigned char *base, size_t bytes) {
    uint64_t sum = 0;
    for (size_t i = 0, pages = bytes / PAGE; i < pages; i++)
        sum += base[i * 2654435761u % pages * PAGE];
    return sum;
}

static uint64_t scan(const volatile unsigned char *base, size_t bytes) {
    uint64_t sum = 0;
    for (size_t at = 0; at < bytes; at += LINE)
        sum += base[at];
    return sum;
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    size_t bytes = strtoull(argv[2], NULL, 10), each = bytes / PIECES;
    ps_piece pieces[PIECES];
    for (size_t i = 0; i < PIECES; i++) {
        pieces[i].start = memset(malloc(each), 1, each);
        pieces[i].bytes = each;
    }
    ps_server *server;
    ps_region *region;
    if (ps_server_pool(NULL, &server) || ps_region_of_pieces(server, pieces, PIECES, &region)) {
        fprintf(stderr, "%s\n", ps_last_error());
        return 1;
    }
    const volatile unsigned char *base = ps_region_data(region);
    uint64_t start = now();
    uint64_t sum = !strcmp(argv[1], "scan") ? scan(base, bytes) : random_touches(base, bytes);
    printf("%llu\n", (unsigned long long)(now() - start));
    ps_region_free(region);
    ps_server_free(server);
    return sum != (!strcmp(argv[1], "scan") ? bytes / LINE : bytes / PAGE);
}
