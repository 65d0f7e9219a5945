// cert-manager's signer for CertificateSigningRequest objects: ClusterIssuers with a CA, and its controller for their
// signer names (in cert-manager itself behind the gate ExperimentalCertificateSigningRequestControllers).
//
// The controllers are cert-manager's own. Its own main is in a module that no proxy serves, so that this starts them.
package main

import (
	"context"
	"flag"
	"log"
	"os/signal"
	"syscall"

	"github.com/cert-manager/cert-manager/pkg/controller"
	"github.com/cert-manager/cert-manager/pkg/controller/certificatesigningrequests/ca"
	"github.com/cert-manager/cert-manager/pkg/controller/clusterissuers"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/ca"
)

func main() {
	kubeconfig := flag.String("kubeconfig", "", "who it is, and where the API server is")
	namespace := flag.String("cluster-resource-namespace", "cert-manager", "where the Secrets of ClusterIssuers are")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	options := controller.ContextOptions{Kubeconfig: *kubeconfig, KubernetesAPIQPS: 100, KubernetesAPIBurst: 100}
	options.ClusterResourceNamespace = *namespace
	factory, err := controller.NewContextFactory(ctx, options)
	if err != nil {
		log.Fatal(err)
	}
	shared, err := factory.Build()
	if err != nil {
		log.Fatal(err)
	}
	var started []controller.Interface
	for _, name := range []string{clusterissuers.ControllerName, ca.CSRControllerName} {
		one, err := controller.Known()[name](factory)
		if err != nil {
			log.Fatalf("%s: %v", name, err)
		}
		started = append(started, one)
	}
	shared.KubeSharedInformerFactory.Start(ctx.Done())
	shared.SharedInformerFactory.Start(ctx.Done())
	for _, one := range started {
		go func() {
			if err := one.Run(5, ctx); err != nil {
				log.Fatal(err)
			}
		}()
	}
	<-ctx.Done()
}
