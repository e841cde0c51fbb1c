/* Scattered memory as one range of addresses: the known answers, each in one call.
 *
 * 1. A fault handler copies a page when it is first touched: ps_region_of_pieces(). Any pieces, no rights.
 * 2. One memfd mapped many times: ps_region_of_memfd(). No copy; the pieces have to come from the memfd.
 * 3. pagemap and /dev/mem: ps_region_of_frames(). No copy; root, and a kernel without CONFIG_STRICT_DEVMEM. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pagestitch.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096 };

static int shown(const char *answer, int status, ps_region *const *place) {
    if (status) {
        printf("%-14s %s\n", answer, ps_last_error());
        return 0;
    }
    const ps_region *region = *place;
    const char *base = (const char *)ps_region_data(region);
    int right = base[0] == 'b' && base[PAGE] == 'a' && ps_region_bytes(region) == 2 * PAGE;
    printf("%-14s %s\n", answer, right ? "one range of addresses" : "WRONG BYTES");
    return !right;
}

int main(void) {
    int fd = memfd_create("pieces", 0);
    if (fd < 0 || ftruncate(fd, 2 * PAGE))
        return 1;
    char *shared = (char *)mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *own = (char *)mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED || own == MAP_FAILED)
        return 1;
    memset(shared, 'a', PAGE), memset(shared + PAGE, 'b', PAGE), memcpy(own, shared, 2 * PAGE);

    ps_server *server;
    if (ps_server_best(&server)) {
        fprintf(stderr, "%s\n", ps_last_error());
        return 1;
    }
    /* The second page first. */
    ps_piece pieces[] = { { own + PAGE, PAGE }, { own, PAGE } };
    ps_extent parts[] = { { PAGE, PAGE }, { 0, PAGE } };
    ps_region *copied = NULL, *mapped = NULL, *frames = NULL;
    int wrong = shown("fault handler", ps_region_of_pieces(server, pieces, 2, &copied), &copied);
    wrong |= shown("memfd", ps_region_of_memfd(server, fd, parts, 2, &mapped), &mapped);
    wrong |= shown("/dev/mem", ps_region_of_frames(server, pieces, 2, &frames), &frames);
    ps_region_free(copied), ps_region_free(mapped), ps_region_free(frames);
    ps_server_free(server);
    return wrong;
}
