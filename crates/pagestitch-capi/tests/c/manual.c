/* An event loop of the program serves the faults of another thread. */
#include "test.h"
#include <poll.h>
#include <pthread.h>

static const char bytes[9000] = "the first byte";

static void *touch(void *region) {
    const char *base = (const char *)ps_region_data((const ps_region *)region);
    CHECK(base[0] == 't' && base[8999] == 0);
    return NULL;
}

int main(void) {
    ps_server *server;
    ps_region *region;
    ps_piece piece = { bytes, sizeof bytes };
    OK(ps_server_manual(&server));
    OK(ps_region_of_pieces(server, &piece, 1, &region));
    pthread_t thread;
    CHECK(!pthread_create(&thread, NULL, touch, region));
    uint64_t faults = 0;
    while (faults < 2) {
        struct pollfd ready = { ps_server_fd(server), POLLIN, 0 };
        CHECK(ready.fd >= 0 && poll(&ready, 1, -1) == 1);
        OK(ps_server_serve(server, 100, NULL));
        OK(ps_region_metric(region, "faults", &faults));
    }
    CHECK(!pthread_join(thread, NULL));
    OK(ps_region_free(region));
    OK(ps_server_free(server));
    return 0;
}
